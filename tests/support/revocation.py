"""Lists of revoked certificates, and an authority between two others."""

import subprocess
from pathlib import Path

from gmemd_tools.demo.certificates import Authority

CONFIG = "[ca]\ndefault_ca = us\n[us]\ndatabase = {folder}/index.txt\ndefault_md = sha256\nunique_subject = no\n"
PAST = ("-crl_lastupdate", "20200101000000Z", "-crl_nextupdate", "20200102000000Z")
FUTURE = ("-crl_lastupdate", "20980101000000Z", "-crl_nextupdate", "20990101000000Z")
TODAY = ("-crldays", "1")
OLD = ("-crl_lastupdate", "20200101000000Z", "-crl_nextupdate", "20990101000000Z")  # and good still


def revoked(folder: Path, authority: Authority, *certificates: Path, when: tuple[str, ...] = TODAY) -> Path:
    """A new list of an authority, in a folder of its own."""
    folder.mkdir()
    (folder / "index.txt").touch()
    config = folder / "ca.cnf"
    config.write_text(CONFIG.format(folder=folder))
    signed = ("-config", config, "-cert", authority.certificate, "-keyfile", authority.key)
    for certificate in certificates:
        _openssl("ca", *signed, "-revoke", certificate)
    _openssl("ca", *signed, "-gencrl", *when, "-out", folder / "crl.pem")
    return folder / "crl.pem"


def intermediate(folder: Path, root: Authority) -> Authority:
    """An authority that another vouches for."""
    made = Authority(folder, "middle")
    request, extensions = folder / "middle.csr", folder / "extensions"
    extensions.write_text("basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n")
    _openssl("req", "-new", "-key", made.key, "-subj", "/CN=gmemd middle", "-out", request)
    by = ("-CA", root.certificate, "-CAkey", root.key, "-days", "1", "-extfile", extensions)
    _openssl("x509", "-req", "-in", request, *by, "-out", made.certificate)
    return made


def _openssl(*words: str | Path) -> None:
    run = subprocess.run(["openssl", *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
