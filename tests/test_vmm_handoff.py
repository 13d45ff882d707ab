"""The reference VMM's conversations and command line: what it answers, refuses, and survives."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from vmm_play import (
    EX_CONFIG,
    EX_PROTOCOL,
    EX_UNAVAILABLE,
    EX_USAGE,
    MESSAGE_LIMIT,
    Event,
    Guest,
    Sockets,
    Vmm,
    assert_right,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ["vmm_fixtures"]

# Where in the state blob its parts begin (tools/vmm/state.h).
STATE_VERSION, STATE_STOPPED = 8, 64


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda state: state[:0], "0 bytes", id="empty"),
        pytest.param(lambda state: state[:40], "40 bytes are too few", id="short"),
        pytest.param(lambda state: state[:-1], "it says", id="cut"),
        pytest.param(lambda state: state + b"x", "it says", id="long"),
        pytest.param(lambda state: flipped(state, 0), "not one of gmemd-vmm", id="magic"),
        pytest.param(lambda state: flipped(state, STATE_VERSION), "version 0", id="version"),
        pytest.param(lambda state: flipped(state, STATE_STOPPED), "damaged", id="time"),
        pytest.param(lambda state: flipped(state, len(state) - 1), "damaged", id="last-byte"),
    ],
)
def test_a_damaged_state_is_refused(
    start: Callable[..., Vmm], sockets: Sockets, spoil: Callable[[bytes], bytes], message: str
) -> None:
    moved = Guest(start, sockets, "--memory", "2M")
    moved.pause()
    moved.copy()
    moved.state = spoil(moved.state)
    moved.ready()
    assert message in moved.destination.expect("error")["message"]
    assert moved.destination.end() == EX_PROTOCOL


@pytest.mark.usefixtures("require_kvm")
@pytest.mark.parametrize(
    ("arrives_as", "message"),
    [
        (["--memory", "4M"], "has 2097152 bytes of memory, --memory says 4194304"),
        (["--vcpus", "2"], "has 1 vCPUs, --vcpus says 2"),
        (["--guest", "kvm"], "is one of threads, --guest says kvm"),
    ],
)
def test_another_machine_is_refused(
    start: Callable[..., Vmm], sockets: Sockets, arrives_as: list[str], message: str
) -> None:
    moved = Guest(start, sockets, "--memory", "2M", "--guest", "threads", arrives_as=arrives_as)
    moved.pause()
    moved.ready()
    assert message in moved.destination.expect("error")["message"]
    assert moved.destination.end() == EX_CONFIG


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": "region 3: too short"}, "gmemd: region 3: too short"),
        ({"ready": True, "trap": "minor", "populate": "write"}, "without the guest's state"),
        ({"ready": True, "state": 1}, "without the guest's state"),
        (b"[1]", "not a JSON object"),
        (b'{"ready": true,}', "not a JSON object"),
        (None, "closed the connection"),
    ],
)
def test_a_guest_does_not_run_without_ready(
    start: Callable[..., Vmm], sockets: Sockets, answer: Event | bytes | None, message: str
) -> None:
    destination = start("destination", "--gmemd", sockets.daemon, "--migration", "m1", "--memory", "2M")
    daemon = sockets.from_destination()
    daemon.receive()
    if answer is None:
        daemon.connection.close()
    else:
        daemon.send(answer)
    assert message in destination.expect("error")["message"]
    assert destination.end() == EX_PROTOCOL


def test_errors_and_a_lost_daemon_do_not_stop_a_guest_that_runs(
    start: Callable[..., Vmm], sockets: Sockets, guest: str
) -> None:
    moved = Guest(start, sockets, "--memory", "2M", "--guest", guest)
    moved.move()
    moved.destination.expect("first-instruction")
    moved.daemon.send({"error": "no space left"})
    assert moved.destination.expect("error")["message"] == "no space left"
    moved.daemon.send({"abandoned": "by an operator"})
    assert moved.destination.expect("abandoned")["message"] == "by an operator"
    moved.daemon.connection.close()
    moved.destination.expect("disconnected")
    moved.destination.command("verify")
    moved.destination.expect("refused")
    assert moved.destination.end() == 0


def test_a_guest_goes_on_after_a_failed_migration(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "4M", "--vcpus", "2", "--guest", guest)
    source.expect("filled")
    source.expect("running")
    sender = sockets.to_source()
    sender.ask({"gmemd": 1, "send": "m1"})
    sender.ask({"pause": True})
    steps = source.expect("paused")["steps"]
    sender.send({"error": "the destination refused", "resume": True})
    assert source.expect("failed")["message"] == "the destination refused"
    source.expect("resumed")
    sender.ask({"pause": True})
    assert all(new >= old for new, old in zip(source.expect("paused")["steps"], steps, strict=True))
    sender.send({"error": "again", "resume": True})
    source.expect("failed")
    source.expect("resumed")
    source.command("verify")
    assert_right(source.event())
    answer, _ = sender.ask({"pause": True})
    assert answer == {"error": "the guest has ended"}


def test_a_second_sender_gets_the_same(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
    moved = Guest(start, sockets, "--memory", "4M", "--guest", guest)
    rival = sockets.to_source()
    assert rival.receive()[0] == {"error": "another gmemd-source is connected"}
    moved.pause()
    moved.sender.connection.close()
    moved.source.expect("disconnected")
    second = sockets.to_source()
    regions, since = second.ask({"gmemd": 1, "send": "m1"})
    assert regions == moved.regions
    answer, files = second.ask({"pause": True})
    assert answer == {"paused": True, "state": 0}
    assert os.pread(files[0], 1 << 20, 0) == moved.state
    second.send({"error": "the source is to wait"})
    assert moved.source.expect("failed")["message"] == "the source is to wait"
    moved.since = since
    moved.copy()
    moved.ready()
    moved.destination.expect("ready")
    moved.destination.expect("first-instruction")
    moved.done()
    second.send({"done": True})
    moved.source.expect("done")
    assert_right(moved.verify())


def test_requests_that_a_source_cannot_serve(start: Callable[..., Vmm], sockets: Sockets) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "2M")
    source.expect("filled")
    source.expect("running")
    sender = sockets.to_source()
    assert "version 1" in sender.ask({"gmemd": 2, "send": "m1"})[0]["error"]
    assert "version 1" in sender.ask({"send": "m1"})[0]["error"]
    assert "no such request" in sender.ask({"sing": True})[0]["error"]
    assert "no such request" in sender.ask({"pause": False})[0]["error"]
    sender.send(b"pause")
    assert "not a JSON object" in source.expect("disconnected")["message"]
    sockets.to_source().send(b'{"a":' + b" " * (MESSAGE_LIMIT - 6) + b"1}")
    assert "larger than the protocol allows" in source.expect("disconnected")["message"]
    assert "regions" in sockets.to_source().ask({"gmemd": 1, "send": "m1"})[0]
    source.command("dance")
    source.expect("refused")


@pytest.mark.parametrize(
    "text",
    [
        rb'{"gmemd": 1, "send": "m1", "later": {"a": [1, -2.5e3, null, false, "\u00e9\n"]}}',
        b' { "later" : [ ] , "send" : "m1" , "gmemd" : 1 } ',
        b'{"nested": {"gmemd": 2}, "gmemd": 1, "send": ""}',
    ],
)
def test_unknown_keys_are_ignored(start: Callable[..., Vmm], sockets: Sockets, text: bytes) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "2M")
    source.expect("filled")
    source.expect("running")
    assert "regions" in sockets.to_source().ask(text)[0]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":1 "b":2}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":1.}',
        rb'{"a":"\x"}',
        rb'{"a":"\u12g4"}',
        b'{"a":"\n"}',
        b'{"a":nil}',
        b'{"a":[1,]}',
        b'{"a":[}]',
        b'{"gmemd":1,"send":"m1"}}',
        b'{"gmemd":1,"send":"m1"}\0',
        b'{"a":' + b"[" * 30 + b"]" * 30 + b"}",
    ],
)
def test_what_is_not_json_is_refused(start: Callable[..., Vmm], sockets: Sockets, text: bytes) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "2M")
    source.expect("filled")
    source.expect("running")
    sockets.to_source().send(text)
    message = source.expect("disconnected")["message"]
    assert message in ("a message is not a JSON object", "it closed the connection")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "source"),
        (["sideways"], "source"),
        (["source"], "--listen"),
        (["destination", "--gmemd", "x"], "--migration"),
        (["source", "--listen", "x", "--memory", "1Q"], "not a size"),
        (["source", "--listen", "x", "--memory", "-1M"], "not a size"),
        (["source", "--listen", "x", "--memory", "99999999T"], "not a size"),
        (["source", "--listen", "x", "--memory", "4K"], "from 1M"),
        (["source", "--listen", "x", "--memory", "1025K"], "a multiple of 4096"),
        (["source", "--listen", "x", "--memory", "3M", "--backing", "hugetlb"], "a multiple of 2097152"),
        (["source", "--listen", "x", "--vcpus", "9"], "from 1 to 8"),
        (["source", "--listen", "x", "--regions", "0"], "from 1 to 64"),
        (["source", "--listen", "x", "--backing", "paper"], "paper"),
        (["source", "--listen", "x", "--backing", "mixed"], "--regions 2"),
        (["source", "--listen", "x", "--pattern"], "lacks its value"),
        (["source", "--listen", "x", "--shiny"], "--shiny"),
        (["source", "--listen", "x", "extra"], "extra"),
        (["source", "--listen", "x" * 200], "too long"),
        (["destination", "--gmemd", "x", "--migration", "m", "--seed", "2"], "--seed is for the source"),
        (["source", "--listen", "x", "--slot", "guest_memfd"], "--slot guest_memfd needs --backing guest_memfd"),
        (["source", "--listen", "x", "--no-direct-map"], "--no-direct-map needs --slot guest_memfd"),
        (["source", "--listen", "x", "--prefault"], "--prefault is for a destination with --slot guest_memfd"),
    ],
)
def test_usage_errors(start: Callable[..., Vmm], arguments: list[str], message: str) -> None:
    vmm = start(*arguments)
    while (event := vmm.event())["event"] != "error":
        assert event["event"] == "filled"
    assert message in event["message"]
    assert vmm.end() == EX_USAGE


def test_no_daemon(start: Callable[..., Vmm], tmp_path: Path) -> None:
    vmm = start("destination", "--gmemd", tmp_path / "none", "--migration", "m1", "--memory", "2M")
    assert "No such file" in vmm.expect("error")["message"]
    assert vmm.end() == EX_UNAVAILABLE


def test_guest_memfd_without_kvm(start: Callable[..., Vmm], sockets: Sockets) -> None:
    vmm = start("source", "--listen", sockets.source, "--backing", "guest_memfd", "--guest", "threads")
    assert "--guest kvm" in vmm.expect("error")["message"]
    assert vmm.end() == EX_UNAVAILABLE
