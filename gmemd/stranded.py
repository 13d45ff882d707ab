"""Migrations that were kept and cannot be taken over. Nothing of them is touched, and the guest waits, until an
operator gives them up or another gmemd takes them over."""

import json
import logging
import socket
from contextlib import suppress

from gmemd.callers import ROOT, Caller
from gmemd.keeping import VMM, Keeper, Stranded
from gmemd.notify import Notifier
from gmemd.registry import Registry, Unusable

log = logging.getLogger(__name__)


async def hold(stranded: Stranded, registry: Registry, store: Notifier) -> None:
    """Keeps the name from being used again, and waits for an operator."""
    name = stranded.migration
    log.error("cannot be taken over, its guest waits: %s", stranded.why, extra={"migration": name})
    keeper = Keeper(store, name)
    keeper.adopt(stranded.parts)
    owner = _owner(stranded)
    with registry.reserved(name, owner, kept=True):
        unusable = registry.unusable[name] = Unusable(name, owner, stranded.why, sorted(stranded.parts))
        try:
            await unusable.given_up.wait()
        finally:
            del registry.unusable[name]
        _tell_vmm(stranded)
        keeper.forget_guest()


def _owner(stranded: Stranded) -> int:
    """Nobody but an operator's, unless it has a VMM."""
    for fd in stranded.parts.get(VMM, ()):
        with suppress(OSError), socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_SEQPACKET) as vmm:
            return Caller.of(vmm).uid
    return ROOT


def _tell_vmm(stranded: Stranded) -> None:
    message = json.dumps({"abandoned": stranded.why}).encode()
    for fd in stranded.parts.get(VMM, ()):
        with suppress(OSError), socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_SEQPACKET) as vmm:
            vmm.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
