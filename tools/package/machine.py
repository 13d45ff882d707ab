"""A Debian machine with its own systemd, in a container (systemd-nspawn), thrown away afterwards."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

PACKAGES = "systemd,systemd-sysv,dbus,udev,python3,libssl3,man-db,adduser"
DEVICES = ("/dev/kvm", "/dev/userfaultfd")
BOOT_SECONDS = 90.0
STEP = 0.1
# nspawn keeps things below /run that it removes only from a tmpfs, and /run may be on a disk.
START = """
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
exec systemd-nspawn --quiet --register=no --keep-unit --private-network --console=pipe --directory="$@" --boot
"""


class Machine:
    """Booted from a copy of `archive`, which is made the first time."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.root = Path(tempfile.mkdtemp(prefix="gmemd-machine."))
        self._log = self.root.with_suffix(".log").open("wb")
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0

    def __enter__(self) -> Self:
        if not self.archive.exists():
            make(self.archive)
        subprocess.run(["tar", "-x", "-C", self.root, "-f", self.archive], check=True)
        binds = [f"--bind={device}" for device in DEVICES if os.path.exists(device)]
        self._nspawn = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", START, "sh", str(self.root), *binds],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self._wait_for_boot()
        except BaseException:
            self.close()
            raise
        return self

    def _wait_for_boot(self) -> None:
        assert self._nspawn
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end and self._nspawn.poll() is None:
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
            self.leader = int(children[0]) if children else 0
            if self.leader and self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"):
                return
            time.sleep(STEP)
        log = Path(self._log.name).read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the machine did not start: {log}")

    def command(self, *command: str) -> list[str]:
        """To be run in there."""
        return ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd=/",
                "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", *command]  # fmt: skip

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*command), text=True, capture_output=True)

    def check(self, *command: str) -> str:
        """Its output; RuntimeError with all that it said when it fails."""
        run = self.run(*command)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: {run.returncode}\n{run.stdout}{run.stderr}")
        return run.stdout

    def start(self, *command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(self.command(*command), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def put(self, path: Path, to: str) -> None:
        shutil.copy(path, self.root / to.lstrip("/"))

    def close(self) -> None:
        """All that runs in there ends with its init, and its init with nspawn."""
        if self._nspawn and self._nspawn.poll() is None:
            self._nspawn.terminate()
            try:
                self._nspawn.wait(BOOT_SECONDS)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        self._log.close()
        os.unlink(self._log.name)
        shutil.rmtree(self.root, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.close()


def make(archive: Path) -> None:
    """A small Debian 12 as a tar archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(".part.tar")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(partial)]
    subprocess.run(command, check=True)
    partial.rename(archive)
