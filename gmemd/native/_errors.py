"""From a `struct gm_problem` to an exception."""

from typing import Any

from gmemd import errors
from gmemd.native._native import ffi, lib


def problem() -> Any:
    """A new `struct gm_problem *`, to be filled by a call."""
    return ffi.new("struct gm_problem *")


def exception(found: Any) -> errors.GmemdError:
    """The exception that says what `found` does."""
    text = ffi.string(found.text).decode(errors="replace")
    if found.blame == lib.GM_PEER:
        return errors.ProtocolError(text)
    if found.blame == lib.GM_VMM:
        return errors.HandoffError(text)
    if found.blame == lib.GM_UNTRUSTED:
        return errors.UntrustedError(text)
    if found.blame == lib.GM_LINK:
        return errors.LinkError(text)
    return errors.KernelError(text, found.error)


def check(call: Any, *args: Any) -> int:
    """Calls a native function whose last parameter is the problem, and which returns a negative number on failure."""
    found = problem()
    result: int = call(*args, found)
    if result < 0:
        raise exception(found)
    return result


def checked(call: Any, *args: Any) -> Any:
    """The same for a function that returns a pointer, NULL on failure."""
    found = problem()
    pointer = call(*args, found)
    if pointer == ffi.NULL:
        raise exception(found)
    return pointer
