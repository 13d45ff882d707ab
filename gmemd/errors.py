"""What can go wrong, each with the exit code that a command ends with (sysexits.h).

An error that is one of these has a message for people: what, where, whose fault, with values. A command prints it as
one line. Any other exception is a bug of ours and keeps its traceback.
"""

import errno
import os

SIGNALLED = 128  # exit codes of commands that a signal has ended, as shells have them: and its number


def reason(error: BaseException) -> str:
    """Why a system call failed, in the kernel's words alone: Python and trio put others around them."""
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)


class GmemdError(Exception):
    """Base of all errors that we mean to raise."""

    exit_code = os.EX_SOFTWARE


class UsageError(GmemdError):
    """The command line asks for something that makes no sense. The user mends it."""

    exit_code = os.EX_USAGE


class ConfigError(GmemdError):
    """The configuration file is wrong. The operator mends it; nothing was started."""

    exit_code = os.EX_CONFIG


class DataError(GmemdError):
    """A file that was given to us does not hold what it should. Trying again does not help."""

    exit_code = os.EX_DATAERR


class UnavailableError(GmemdError):
    """This host or a service on it lacks what the job needs. `gmemd doctor` tells more."""

    exit_code = os.EX_UNAVAILABLE


class PermissionRefusedError(GmemdError):
    """The caller may not do this."""

    exit_code = os.EX_NOPERM


class KernelError(GmemdError):
    """The kernel refused what it should have done. `errno` is its answer."""

    exit_code = os.EX_OSERR

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class ProtocolError(GmemdError):
    """The peer broke the protocol. The connection is dropped; the migration keeps what it has."""

    exit_code = os.EX_PROTOCOL


class RefusedError(GmemdError):
    """The peer understood us and said no. Trying the same again does not help."""

    exit_code = os.EX_PROTOCOL


class UntrustedError(RefusedError):
    """One end has not shown the other that it is who it should be. The operator of one of them mends it."""

    exit_code = os.EX_NOPERM


class LinkError(GmemdError):
    """A connection broke, stalled or could not be made. Trying again is the right thing."""

    exit_code = os.EX_TEMPFAIL


class HandoffError(GmemdError):
    """A VMM handed over what cannot be used. It is told why; no other migration is touched."""

    exit_code = os.EX_DATAERR


class AbandonedError(GmemdError):
    """The migration was given up on purpose, or its VMM is gone."""

    exit_code = os.EX_UNAVAILABLE


def by_exit_code(code: int) -> type[GmemdError]:
    """The error that a command of ours ended with; UnavailableError for any other end."""
    return next((kind for kind in GmemdError.__subclasses__() if kind.exit_code == code), UnavailableError)


# What a system call finds wanting that the caller did not look at: no bug, and not the caller's job to tell.
WANTING = {
    errno.EMFILE: "raise the limit of descriptors (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: "raise fs.file-max (sysctl)",
    errno.ENOMEM: "free some, or ask for less",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
}


def for_people(error: BaseException) -> GmemdError | None:
    """An error as a command tells it; None for a bug of ours."""
    if isinstance(error, GmemdError):
        return error
    if isinstance(error, OSError) and error.errno in WANTING:
        where = f"{error.filename}: " if error.filename else ""
        return UnavailableError(f"{where}{reason(error)}: {WANTING[error.errno]}")
    return None
