"""`make test-package`: the life of the Debian package under a real systemd."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gmemd_tools.package.machine import Machine

EXAMPLE = Path(__file__).parents[2] / "docs/example_vmm.py"
MIB = 1 << 20
SIZE = 32 * MIB
PATIENCE = 120.0
# The drop-in is this test's own; units of commands that were run are systemd's.
LEFTOVERS = ("-name", "*gmemd*", "-not", "-path", "/run/systemd/*")


def main(package: Path, archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Machine(archive) as machine:
        later = repacked(package, Path(folder))
        for file in (package, later, EXAMPLE):
            machine.put(file, f"/root/{file.name}")
        installed(machine, package.name)
        used(machine, "first", lambda: None)
        used(machine, "second", lambda: upgraded(machine, later.name))
        used(machine, "third", lambda: watchdog_bites(machine))
        used(machine, "fourth", lambda: misconfigured(machine))
        used(machine, "fifth", lambda: not_removed(machine))
        removed(machine)


def say(text: str) -> None:
    print(f"package: {text}", flush=True)


def expect(true: object, what: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {what}")


def until(look: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        expect(time.monotonic() < end, what)
        time.sleep(0.2)
    return found


def repacked(package: Path, folder: Path) -> Path:
    """The same under a later version."""
    subprocess.run(["dpkg-deb", "-R", package, folder / "tree"], check=True)
    control = folder / "tree/DEBIAN/control"
    control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 1:"))
    subprocess.run(["dpkg-deb", "-b", "-Znone", folder / "tree", folder / "later.deb"], check=True, capture_output=True)
    return folder / "later.deb"


def installed(machine: Machine, name: str) -> None:
    machine.check("dpkg", "-i", f"/root/{name}")
    version = machine.check("gmemd", "--version").strip()
    expect(machine.check("systemctl", "is-active", "gmemd.service").strip() == "active", "the service runs")
    expect("0 migrations" in until(lambda: status_text(machine), "a status text"), "systemctl status tells")
    user = machine.check("stat", "-c", "%U", f"/proc/{main_pid(machine)}").strip()
    expect(user == "gmemd", f"the daemon has its own user, not {user}")
    for page in ("1 gmemd", "1 gmemd-source", "1 gmemd-replay", "5 gmemd.toml", "7 gmemd-protocol"):
        machine.check("man", "--where", *page.split())
    say(f"installed and started: {version}")


def status_text(machine: Machine) -> str:
    return machine.check("systemctl", "show", "-P", "StatusText", "gmemd.service").strip()


def told(machine: Machine, name: str) -> dict[str, Any]:
    """What the daemon says of a migration, {} if nothing or nobody is there."""
    run = machine.run("gmemd", "status", "--json")
    answer = json.loads(run.stdout) if run.returncode == 0 else {"migrations": [], "finished": []}
    return next((m for m in answer["migrations"] + answer["finished"] if m["migration"] == name), {})


def used(machine: Machine, name: str, meanwhile: Callable[[], None]) -> None:
    """A migration in there. Its source is stopped for what happens meanwhile, so that the guest has a page to wait for;
    in the end, the VMM hashes all of its memory."""
    content = os.urandom(SIZE)
    (machine.root / "root/memory").write_bytes(content)
    vmm = unit(machine, f"vmm-{name}", "python3", "/root/example_vmm.py", "/run/gmemd/gmemd.sock", name, str(SIZE))
    until(lambda: told(machine, name), f"{name} is handed over")
    signal(machine, "STOP", f"vmm-{name}")  # it must not have read everything before we have looked
    what = ("--migration", name, "--file", "/root/memory")
    source = unit(machine, f"source-{name}", "gmemd-source", "127.0.0.1:7575", *what, "--no-background", "--json")
    until(lambda: told(machine, name).get("phase") == "running", f"{name} runs")
    signal(machine, "STOP", f"source-{name}")
    signal(machine, "CONT", f"vmm-{name}")
    until(lambda: told(machine, name)["waits"], f"the guest of {name} waits")
    meanwhile()
    expect(told(machine, name)["phase"] == "running", f"{name} is in the middle")
    signal(machine, "CONT", f"source-{name}")
    out, _ = vmm.communicate(timeout=PATIENCE)
    sent, _ = source.communicate(timeout=PATIENCE)
    expect(hashlib.sha256(content).hexdigest() in out, f"every byte of {name} is right: {out}")
    expect(json.loads(sent.splitlines()[-1])["ok"], f"the source is content: {sent}")
    ended = until(lambda: (m := told(machine, name)).get("phase") == "complete" and m, f"{name} is complete")
    fields = machine.check("journalctl", "-o", "json", "-u", "gmemd", f"GMEMD_MIGRATION={name}").splitlines()
    expect(any("complete" in json.loads(line)["MESSAGE"] for line in fields), "the journal has it by its field")
    say(f"used: {name}, {SIZE // MIB} MiB, sha256 right, {ended['recoveries']} recoveries")


def unit(machine: Machine, name: str, *command: str) -> "subprocess.Popen[str]":
    return machine.start("systemd-run", "--quiet", "--pipe", "--wait", f"--unit={name}", *command)


def signal(machine: Machine, name: str, service: str) -> None:
    machine.check("systemctl", "kill", f"--signal={name}", f"{service}.service")


def anew(machine: Machine, name: str, what: Callable[[], object]) -> None:
    """After this there is another daemon, and it has the migration, whose guest still waits."""
    pid = main_pid(machine)
    what()
    until(lambda: main_pid(machine) not in (pid, "0"), "the daemon was started anew")
    until(lambda: told(machine, name).get("waits"), f"it has {name}, and hears of the wait anew")


def upgraded(machine: Machine, name: str) -> None:
    anew(machine, "second", lambda: say(machine.check("dpkg", "-i", f"/root/{name}").splitlines()[0]))
    expect(machine.check("dpkg-query", "-W", "-f", "${Version}", "gmemd").startswith("1:"), "the later version")
    say("upgraded in the middle of a migration")


def main_pid(machine: Machine) -> str:
    return machine.check("systemctl", "show", "-P", "MainPID", "gmemd.service").strip()


def watchdog_bites(machine: Machine) -> None:
    """A daemon that stands still is killed by its service manager, and its successor goes on."""
    (machine.root / "root/watchdog.conf").write_text("[Service]\nWatchdogSec=2\nTimeoutAbortSec=2\n")
    folder = "/run/systemd/system/gmemd.service.d"
    machine.check("sh", "-c", f"mkdir -p {folder} && cp /root/watchdog.conf {folder}")
    machine.check("systemctl", "daemon-reload")
    anew(machine, "third", lambda: machine.check("systemctl", "restart", "gmemd.service"))
    anew(machine, "third", lambda: signal(machine, "STOP", "gmemd"))
    expect("Watchdog timeout" in machine.check("journalctl", "-u", "gmemd"), "the journal tells of the watchdog")
    say("restarted; then it stood still, was killed by the watchdog, and went on")


def misconfigured(machine: Machine) -> None:
    """A daemon that was told to end, and one that cannot start, lose nobody."""
    anew(machine, "fourth", lambda: signal(machine, "HUP", "gmemd"))
    file = machine.root / "etc/gmemd/gmemd.toml"
    file.write_text("[netwrok]\n")
    expect(machine.run("timeout", "2", "systemctl", "restart", "gmemd.service").returncode, "it does not start")
    expect("no such table" in machine.check("journalctl", "-u", "gmemd"), "the journal tells why")
    refused_removal(machine)
    anew(machine, "fourth", file.unlink)
    say("ended by a signal, then restarted with a wrong configuration; went on when that was mended")


def refused_removal(machine: Machine) -> None:
    run = machine.run("dpkg", "-r", "gmemd")
    expect(run.returncode and "not complete" in run.stderr, "it is not removed under a guest that is incomplete")


def not_removed(machine: Machine) -> None:
    refused_removal(machine)
    expect(machine.check("systemctl", "is-active", "gmemd.service").strip() == "active", "the service still runs")
    say("not removed under an incomplete guest")


def removed(machine: Machine) -> None:
    machine.check("dpkg", "--purge", "gmemd")
    expect(machine.run("systemctl", "is-active", "gmemd.service").returncode, "the service has ended")
    left = machine.check("find", "/usr/bin", "/usr/lib", "/usr/share", "/lib/systemd", "/run", *LEFTOVERS)
    expect(not left.strip(), f"nothing is left: {left}")
    say("removed")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("package", type=Path, help="what `make deb` has built")
    arguments.add_argument("machine", type=Path, help="a Debian as a tar file; made if it is not there")
    options = arguments.parse_args()
    if not options.package.is_file():
        sys.exit(f"{options.package}: no such package: make deb")
    main(options.package, options.machine)
