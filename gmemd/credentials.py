"""Certificates and pre-shared keys, from files that may change while we run."""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gmemd.errors import ConfigError, KernelError, reason
from gmemd.native.tls import MAX_KEY, MIN_KEY, TlsContext

log = logging.getLogger(__name__)

# A chain of certificates, or some thousand keys.
MAX_FILE = 1 << 20
Stamp = tuple[tuple[int, int, int], ...]


def _option(key: str, path: Path) -> str:
    return f"--{key} {path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Where they are: a certificate with its key, the authorities that the peer's must come from and what these have
    revoked, or pre-shared keys, or both. `ktls`: what is made of them may be used by the kernel. `place`: who named
    a file, for people."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    crl: Path | None = None
    psk: Path | None = None
    ktls: bool = True
    place: Callable[[str, Path], str] = _option

    def __bool__(self) -> bool:
        return self.certificate is not None or self.psk is not None

    def stamp(self) -> Stamp:
        """Another one when any of them has changed."""
        stamps = []
        for what in READERS:
            with self._of(what) as path:
                if path:
                    info = path.stat()
                    stamps.append((info.st_ino, info.st_mtime_ns, info.st_size))
        return tuple(stamps)

    def load(self, *, server: bool) -> TlsContext:
        """Reads them all. ConfigError says which is wrong, and how."""
        context = TlsContext(server=server, ktls=self.ktls)
        for what, read in READERS.items():
            with self._of(what) as path:
                if path and what == "psk":
                    keys = _parse_keys(read(path))
                    if not server and len(keys) > 1:
                        raise ValueError(f"{len(keys)} keys: a source has one, that of its pair of hosts")
                    for name, key in keys.items():
                        context.share(name, key)
                elif path:
                    context.take(what, read(path))
        return context

    def revoke(self, context: TlsContext) -> None:
        """Adds the lists of revoked certificates to what was made of these files before."""
        with self._of("crl") as path:
            if path:
                context.take("crl", _read(path))

    @contextmanager
    def _of(self, what: str) -> Iterator[Path | None]:
        """One of the files. What is wrong with it is told with who named it."""
        path: Path | None = getattr(self, what)
        try:
            yield path
        except (OSError, ValueError, KernelError) as error:
            assert path
            raise ConfigError(f"{self.place(what, path)}: {reason(error)}") from None


class Credentials:
    """Who we are. Files that change are read again for the next connection; as long as they are no good, the old ones
    stay, but what is revoked meanwhile is."""

    def __init__(self, files: Files, *, server: bool) -> None:
        self._files = files
        self._server = server
        self._stamp = files.stamp()
        self._context = self._load()

    def context(self) -> TlsContext:
        """For the next connection."""
        try:
            stamp = self._files.stamp()
            if stamp != self._stamp:
                self._context = self._load()
                self._stamp = stamp
        except (ConfigError, KernelError) as error:
            log.error("the old certificates and keys stay: %s", error, extra={"once": str(error), "every": 60.0})
            with suppress(ConfigError):  # where a list is wrong, too, that is told when it is the first that is
                self._files.revoke(self._context)
        return self._context

    def _load(self) -> TlsContext:
        context = self._files.load(server=self._server)
        text, left = context.describe()
        if text and left <= 0:
            log.warning("our own certificate has expired: %s", text)
        elif text:
            log.info("TLS: we show %s", text)
        text, left = context.describe_list()
        if text and left <= 0:
            log.warning("nobody who shows a certificate is let in by a list that has expired: %s", text)
        elif text:
            log.info("TLS: we refuse %s", text)
        return context


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return _content(file.fileno())


def _read_secret(path: Path) -> bytes:
    """The same for what nobody else may read."""
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o077:
            raise ValueError(
                f"mode {stat.S_IMODE(info.st_mode):04o}, owner {info.st_uid}: a key must be readable by the user that"
                f" we run as alone (uid {os.geteuid()}, mode 0400 or 0600)"
            )
        return _content(file.fileno())


# In the order in which they are read: a key is compared with its certificate.
READERS = {"certificate": _read, "key": _read_secret, "ca": _read, "crl": _read, "psk": _read_secret}


def _content(fd: int) -> bytes:
    data = os.read(fd, MAX_FILE)
    if not data or len(data) == MAX_FILE:
        raise ValueError("empty" if not data else f"more than {MAX_FILE} bytes")
    if b"\0" in data:
        raise ValueError("no text, as it has to be: openssl turns DER into PEM")
    return data


def _parse_keys(text: bytes) -> dict[str, bytes]:
    """Lines `name:key`, the key in hexadecimal digits. What a line holds is not told: it is a secret."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not (name.isascii() and name.isprintable() and 0 < len(name) <= 255) or name in keys:
            raise ValueError(f"line {number}: must be name:key, each name once, of at most 255 characters")
        if not MIN_KEY <= len(key) <= MAX_KEY:
            raise ValueError(f"line {number}: the key must have {2 * MIN_KEY} to {2 * MAX_KEY} hex digits")
        keys[name] = key
    if not keys:
        raise ValueError("no keys: a line name:key each")
    return keys
