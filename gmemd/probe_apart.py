"""Runs checks in a process of their own, so that none of them can take the asker along.

A seccomp filter may kill who makes a call that it does not allow, and a kernel under development may keep a caller
for ever. Both are an answer: the child is given up, the check that it was at gets that as its finding, and a new
child goes on with the next one.
"""

import json
import os
import signal
import socket
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import NoReturn

from gmemd.probe import Check
from gmemd.probe_kernel import Finding, say_errno

DEADLINE = 20.0  # seconds a check; the slowest waits twice for a fault that got lost, 3 s each
MESSAGE = 65536  # bytes; a finding takes a few hundred


def survey(checks: Iterable[Check]) -> dict[str, Finding]:
    """The finding of each check by its name. Call it from a process of one thread, as it forks."""
    left = list(checks)
    found: dict[str, Finding] = {}
    while left:
        try:
            found |= _run(left)
        except OSError as error:
            why = f"no process to try it in: {say_errno(error.errno or 0)}"
            return found | {check.name: Finding(None, None, why) for check in left}
        left = [check for check in left if check.name not in found]
    return found


def _run(checks: Sequence[Check]) -> dict[str, Finding]:
    """The findings of one child: of all checks, or up to the one at which it ended."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near:
        with far:
            child = os.fork()
            if child == 0:
                _answer(checks, far)
        try:
            near.settimeout(DEADLINE)
            return _collect(checks, near, child)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _answer(checks: Sequence[Check], out: socket.socket) -> NoReturn:
    """The child: one message of JSON a check."""
    try:
        for check in checks:
            out.send(json.dumps(astuple(_try(check))).encode())
    finally:
        os._exit(0)


def _try(check: Check) -> Finding:
    try:
        return check.try_it()
    except OSError as error:
        return Finding(None, None, ": ".join(filter(None, (error.filename, say_errno(error.errno or 0)))))
    except Exception as error:  # one broken check must not hide the others
        return Finding(None, None, f"a bug in gmemd: {error!r}")


def _collect(checks: Sequence[Check], source: socket.socket, child: int) -> dict[str, Finding]:
    found: dict[str, Finding] = {}
    for check in checks:
        try:
            data = source.recv(MESSAGE)
        except TimeoutError:
            return found | {check.name: Finding(None, None, f"it hung: given up after {DEADLINE:g} s")}
        if not data:
            return found | {check.name: _death(child)}
        found[check.name] = Finding(*json.loads(data))
    return found


def _death(child: int) -> Finding:
    end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if end is not None and end.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
        name = signal.Signals(end.si_status).name
        refused = name == "SIGSYS"
        why = "a seccomp filter kills who tries" if refused else "it ended the process that tried"
        return Finding(False if refused else None, None, f"{why}: {name}")
    return Finding(None, None, "the process that tried it ended without an answer")
