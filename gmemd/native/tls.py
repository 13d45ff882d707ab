"""TLS: who we are and whom we trust, and the session on one connection."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from gmemd.native._errors import check, checked, exception, problem
from gmemd.native._native import ffi, lib

MIN_KEY, MAX_KEY = lib.GM_TLS_MIN_KEY, lib.GM_TLS_MAX_KEY
KTLS = {lib.GM_TLS_KTLS_SENDS: "send", lib.GM_TLS_KTLS_RECEIVES: "receive"}


class Wants(Enum):
    """What an operation has to wait for: the socket readable, or writable."""

    READ = lib.GM_TLS_WANTS_READ
    WRITE = lib.GM_TLS_WANTS_WRITE


class Pem(NamedTuple):
    """Our certificate with its chain, its key, the certificates that the peer's must come from, and lists of those that
    are revoked."""

    certificate: bytes
    key: bytes
    ca: bytes
    crl: bytes | None = None


TAKE = {
    "certificate": lib.gm_tls_context_certify,
    "key": lib.gm_tls_context_give_key,
    "ca": lib.gm_tls_context_trust,
    "crl": lib.gm_tls_context_revoke,
}


class TlsContext:
    """What the sessions of one end have in common. `shared`: the pre-shared keys by name; a client has one. `ktls`: the
    kernel may do what it can of it."""

    def __init__(
        self, *, server: bool, pem: Pem | None = None, shared: Mapping[str, bytes] | None = None, ktls: bool = True
    ) -> None:
        self.native: Any = ffi.gc(checked(lib.gm_tls_context_new, server, ktls), lib.gm_tls_context_free)
        for what, text in (pem._asdict() if pem else {}).items():
            if text is not None:
                self.take(what, text)
        for name, key in (shared or {}).items():
            self.share(name, key)

    def take(self, what: str, text: bytes) -> None:
        """One file of PEM: `what` of Pem it is, in the order that it has there."""
        check(TAKE[what], self.native, text)

    def share(self, name: str, key: bytes) -> None:
        """One more pre-shared key."""
        check(lib.gm_tls_context_share, self.native, name.encode(), key, len(key))

    def describe(self) -> tuple[str, float]:
        """Our certificate for people, and for how many seconds it is still valid; "" without one."""
        return self._describe(lib.gm_tls_context_describe)

    def describe_list(self) -> tuple[str, float]:
        """The same of the list of revoked certificates that ends first."""
        return self._describe(lib.gm_tls_context_describe_list)

    def _describe(self, call: Any) -> tuple[str, float]:
        out = ffi.new("char[]", lib.GM_TLS_TEXT)
        left = call(self.native, out)
        return ffi.string(out).decode(), float(left)


class Tls:
    """One connection's session. `socket` is a non-blocking descriptor, the caller's."""

    def __init__(self, context: TlsContext, socket: int) -> None:
        self.native: Any = ffi.gc(checked(lib.gm_tls_new, context.native, socket), lib.gm_tls_free)

    def shake_hands(self) -> Wants | None:
        """Goes on with the hand-shake; None when it is done, and the peer is one that we trust."""
        found = problem()
        result = lib.gm_tls_shake_hands(self.native, found)
        return None if result == lib.GM_TLS_DONE else _wants(result, found)

    def read(self, most: int) -> bytes | Wants:
        """What has come, b"" at the end."""
        buffer = ffi.new("unsigned char[]", most)
        found = problem()
        got = lib.gm_tls_read(self.native, buffer, most, found)
        return bytes(ffi.buffer(buffer, got)) if got >= 0 else _wants(got, found)

    def write(self, data: memoryview) -> int | Wants:
        """How many bytes have gone. When it wants something, they must come first the next time."""
        found = problem()
        put = lib.gm_tls_write(self.native, ffi.from_buffer(data), len(data), found)
        return int(put) if put >= 0 else _wants(put, found)

    def close(self) -> None:
        """Says that nothing more will be written."""
        lib.gm_tls_close(self.native)

    @property
    def peer(self) -> str:
        """Who the other end is, for people."""
        out = ffi.new("char[]", lib.GM_TLS_TEXT)
        lib.gm_tls_describe_peer(self.native, out)
        return ffi.string(out).decode()

    def peer_is(self, name: str) -> bool:
        """Whether that is the peer's name. A name that begins with a dot stands for all DNS names that end with it."""
        return bool(lib.gm_tls_peer_is(self.native, name.encode()))

    @property
    def is_shared(self) -> bool:
        """Whether the two ends know each other by a pre-shared key."""
        return bool(lib.gm_tls_shared(self.native))

    @property
    def ktls(self) -> list[str]:
        """What the kernel does of it: "send", "receive", both or neither."""
        found = lib.gm_tls_ktls(self.native)
        return [name for bit, name in KTLS.items() if found & bit]

    def set_most_records(self, records: int) -> None:
        """After so many the connection has to be made anew."""
        lib.gm_tls_set_most_records(self.native, records)

    def free(self) -> None:
        """Nothing native may use it any more."""
        ffi.release(self.native)


def _wants(state: int, found: Any) -> Wants:
    """What it waits for; raises what went wrong instead."""
    if state == lib.GM_TLS_PROBLEM:
        raise exception(found)
    return Wants(state)


def native_of(tls: Tls | None) -> Any:
    """What a lane takes."""
    return tls.native if tls else ffi.NULL
