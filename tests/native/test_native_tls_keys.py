"""A peer that asks for new keys in the middle: openssl s_client does."""

import os
import re
import select
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from gmemd.native.tls import Pem, Tls, TlsContext, Wants
from gmemd_tools.demo.certificates import Authority

SECONDS = 10
PAGE = 4096


@pytest.mark.parametrize("full", [False, True])
def test_new_keys(full: bool, tmp_path: Path) -> None:
    """It gets them, even where there is no room to answer at once, and nothing that is said is lost."""
    ca = Authority(tmp_path)
    own, other = ca.issue("dst", "DNS:dst.example"), ca.issue("src", "DNS:src.example")
    context = TlsContext(server=True, pem=Pem(*(path.read_bytes() for path in own)), ktls=False)
    files = ("-cert", other.certificate, "-key", other.key, "-CAfile", other.ca)
    said = 0
    with (tmp_path / "heard").open("wb") as heard, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        client = subprocess.Popen(
            ["openssl", "s_client", "-msg", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", *files],
            stdin=subprocess.PIPE,
            stdout=heard,
            stderr=subprocess.DEVNULL,
        )
        try:
            sock, _ = listener.accept()
            with sock:
                sock.setblocking(False)
                server = Tls(context, sock.fileno())
                while server.shake_hands():
                    assert select.select([sock], [], [], SECONDS)[0]
                assert client.stdin
                client.stdin.write(b"K\n")
                client.stdin.flush()
                assert select.select([sock], [], [], SECONDS)[0]
                os.kill(client.pid, signal.SIGSTOP)
                page = memoryview(bytes(PAGE))
                while full and isinstance(put := server.write(page), int):
                    said += put
                assert server.read(1) is Wants.READ
                os.kill(client.pid, signal.SIGCONT)
                for _ in range(8):
                    while (put := server.write(page)) is Wants.WRITE:
                        assert select.select([], [sock], [], SECONDS)[1]
                    assert isinstance(put, int)
                    said += put
                server.close()
                sock.shutdown(socket.SHUT_WR)
                assert client.wait(SECONDS) == 0
                server.free()
        finally:
            client.kill()
            client.communicate()
    told = (tmp_path / "heard").read_bytes()
    assert re.search(rb"<<< TLS 1.3, Handshake \[length 0005\], KeyUpdate", told)
    assert told.count(b"\0") == said
