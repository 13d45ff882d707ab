"""Throw-away certificates, made with the commands of docs/tls.md."""

import subprocess
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from gmemd.errors import UnavailableError

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")
LEAF = ("basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth")


class Party(Enum):
    """Who needs a certificate in a demo, by the name in it; a source looks for the address that it connects to."""

    SOURCE = "source.demo"
    DESTINATION = "127.0.0.1"


class Identity(NamedTuple):
    """What one host shows, and what it trusts."""

    certificate: Path
    key: Path
    ca: Path


class Authority:
    """A certificate authority with its files in a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self.certificate = directory / f"{name}.crt"
        self.key = directory / f"{name}.key"
        if self.certificate.exists():
            return
        usage = "keyUsage=critical,keyCertSign,cRLSign"
        self._request(f"gmemd {name}", self.key, self.certificate, "-x509", "-days", "1", "-addext", usage)

    def find(self, name: str) -> Identity:
        """One that has been issued."""
        return Identity(self.directory / f"{name}.crt", self.directory / f"{name}.key", self.certificate)

    def issue(self, name: str, *names: str, days: int = 1) -> Identity:
        """A certificate with these names, such as `DNS:host.example`; of less than a day, one that has expired."""
        files = self.find(name)
        extensions = [*LEAF, *([f"subjectAltName={','.join(names)}"] if names else [])]
        added = [word for extension in extensions for word in ("-addext", extension)]
        request = self.directory / f"{name}.csr"
        self._request(name, files.key, request, *added)
        by = ("-CA", str(self.certificate), "-CAkey", str(self.key))
        days_too = ("-days", str(days), "-copy_extensions", "copy")
        self._openssl("x509", "-req", "-in", str(request), *by, *days_too, "-out", str(files.certificate))
        return files

    def _request(self, name: str, key: Path, out: Path, *options: str) -> None:
        self._openssl("req", "-new", *NEW_KEY, "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(out), *options)

    def _openssl(self, *words: str) -> None:
        try:
            run = subprocess.run(["openssl", *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UnavailableError("openssl, which makes certificates, is missing: apt install openssl") from None
        if run.returncode:
            raise UnavailableError(f"openssl {words[0]}: {run.stderr.strip()}")


def certify(directory: Path, party: Party) -> Identity:
    """The certificate of a demo's party, made when it is first asked for."""
    authority = Authority(directory)
    if (directory / f"{party.name}.crt").exists():
        return authority.find(party.name)
    return authority.issue(party.name, f"{'IP' if party is Party.DESTINATION else 'DNS'}:{party.value}")
