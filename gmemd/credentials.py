"""Certificates and pre-shared keys, from files that may change while we run."""

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from gmemd.errors import ConfigError, KernelError
from gmemd.native.tls import MAX_KEY, MIN_KEY, Pem, TlsContext

log = logging.getLogger(__name__)

# A chain of certificates, or some thousand keys.
MAX_FILE = 1 << 20
Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Where they are: a certificate with its key and the authorities that the peer's must come from, or pre-shared
    keys, or both. `ktls`: what is made of them may be used by the kernel."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    psk: Path | None = None
    ktls: bool = True

    def __post_init__(self) -> None:
        given = [path is not None for path in (self.certificate, self.key, self.ca)]
        if any(given) and not all(given):
            raise ConfigError("TLS: certificate, key and ca go together")

    def __bool__(self) -> bool:
        return self.certificate is not None or self.psk is not None

    def stamp(self) -> Stamp:
        """Another one when any of them has changed."""
        infos = (os.stat(path) for path in (self.certificate, self.key, self.ca, self.psk) if path)
        return tuple((info.st_ino, info.st_mtime_ns, info.st_size) for info in infos)

    def load(self, *, server: bool) -> TlsContext:
        """Reads them all. ConfigError says which is wrong, and how."""
        pem = None
        if self.certificate and self.key and self.ca:
            pem = Pem(_read(self.certificate), _read_secret(self.key), _read(self.ca))
        shared = _parse_keys(self.psk) if self.psk else {}
        if not server and len(shared) > 1:
            raise ConfigError(f"{self.psk}: {len(shared)} keys: a source has one, that of its pair of hosts")
        try:
            return TlsContext(server=server, pem=pem, shared=shared, ktls=self.ktls)
        except KernelError as error:
            raise ConfigError(f"{error} ({self.certificate}, {self.key}, {self.ca})") from None


class Credentials:
    """Who we are. Files that change are read again for the next connection; as long as they are no good, the old ones
    stay."""

    def __init__(self, files: Files, *, server: bool) -> None:
        self._files = files
        self._server = server
        self._stamp = self._look()
        self._context = self._load()

    def context(self) -> TlsContext:
        """For the next connection."""
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._context = self._load()
                self._stamp = stamp
        except ConfigError as error:
            log.error("the old certificates and keys stay: %s", error, extra={"once": str(error), "every": 60.0})
        return self._context

    def _look(self) -> Stamp:
        try:
            return self._files.stamp()
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None

    def _load(self) -> TlsContext:
        context = self._files.load(server=self._server)
        text, left = context.describe()
        if text and left <= 0:
            log.warning("our own certificate has expired: %s", text)
        elif text:
            log.info("TLS: we show %s", text)
        return context


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _content(path, file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _read_secret(path: Path) -> bytes:
    """The same for what nobody else may read."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o077:
                raise ConfigError(
                    f"{path}: mode {stat.S_IMODE(info.st_mode):04o}, owner {info.st_uid}: a key must be readable by"
                    f" the user that we run as alone (uid {os.geteuid()}, mode 0400 or 0600)"
                )
            return _content(path, file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _content(path: Path, fd: int) -> bytes:
    data = os.read(fd, MAX_FILE)
    if not data or len(data) == MAX_FILE:
        raise ConfigError(f"{path}: {'empty' if not data else f'more than {MAX_FILE} bytes'}")
    return data


def _parse_keys(path: Path) -> dict[str, bytes]:
    """Lines `name:key`, the key in hexadecimal digits. What a line holds is not told: it is a secret."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_read_secret(path).decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not (name.isascii() and name.isprintable() and 0 < len(name) <= 255) or name in keys:
            raise ConfigError(f"{path}: line {number}: must be name:key, each name once, of at most 255 characters")
        if not MIN_KEY <= len(key) <= MAX_KEY:
            raise ConfigError(f"{path}: line {number}: the key must have {2 * MIN_KEY} to {2 * MAX_KEY} hex digits")
        keys[name] = key
    if not keys:
        raise ConfigError(f"{path}: no keys")
    return keys
