"""The documents say what the code does: their tables, examples and names, and a source written from one of them."""

import ast
import hashlib
import json
import mmap
import os
import random
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from gmemd import status
from gmemd.errors import ProtocolError
from gmemd.migrate import runs, wire
from gmemd.migrate.link import LinkSettings
from gmemd.migrate.state import TRANSITIONS, Phase, Role
from gmemd.native import check, crc32c, ffi, lib
from gmemd.native.memory import Memory, Note, Populate, Region

TREE = Path(__file__).parents[1]
DOCS = TREE / "docs"
PROTOCOL = DOCS / "protocol.md"
STATE = DOCS / "state.md"
EXAMPLE = DOCS / "example_vmm.py"
SECOND_SOURCE = TREE / "tests/support/second_source.py"
PAGE = 4096
PATIENCE = 30.0  # seconds for a process that takes less than one

Row = list[str]


def section(path: Path, name: str) -> str:
    """What stands between `<!-- name` and `<!-- end name -->`."""
    found = re.search(rf"<!-- {name}:.*?-->\n(.*?)<!-- end {name} -->", path.read_text(), re.DOTALL)
    assert found, f"{path.name} has no section {name}"
    return found[1]


def rows(table: str) -> list[Row]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def table_after(path: Path, words: str) -> list[Row]:
    """The first whole table after some words."""
    after = path.read_text().split(words, 1)[1]
    found = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert found
    return rows(found[0])


def hex_after(path: Path, words: str) -> list[bytes]:
    """The lines of the first block of hex after some words, each as bytes."""
    after = path.read_text().split(words, 1)[1]
    found = re.search(r"(?:^    [0-9a-f ]+\n)+", after, re.MULTILINE)
    assert found
    return [bytes.fromhex(line) for line in found[0].splitlines()]


def number(text: str) -> int:
    base, _, power = text.partition("^")
    value: int = int(base) ** int(power or 1)
    return value


def leading(text: str) -> int:
    """The first number of an offset, or of a range of them."""
    found = re.match(r"\d+", text)
    assert found
    return int(found[0])


# Messages

GOOD_REGION, LARGEST_REGION = [0, 1, 12], [2**63, 2**40, 30]


def values(form: str) -> tuple[list[Any], list[Any]]:
    """The extremes of what the document allows for a field, and what lies just beyond."""
    if match := re.fullmatch(r"(\S+)…(\S+)", form):
        low, high = number(match[1]), number(match[2])
        return [low, high], [low - 1, high + 1, str(low), True]
    if match := re.fullmatch(r"≤ (\d+) characters", form):
        return ["", "é" * int(match[1])], ["x" * (int(match[1]) + 1), b"", 1]
    if match := re.fullmatch(r"≤ (\d+) bytes", form):
        return [b"", bytes(int(match[1]))], [bytes(int(match[1]) + 1), "", 1]
    if match := re.fullmatch(r"(\d+) bytes( or none)?", form):
        size = int(match[1])
        good = [bytes(size), *([b""] if match[2] else [])]
        return good, [bytes(size - 1), bytes(size + 1), "x" * size, *([] if match[2] else [b""])]
    forms: dict[str, tuple[list[Any], list[Any]]] = {
        "bool": ([True, False], [0, 1, None]),
        "id": (["a", "-_.", "Az09" * 15 + "abc"], ["", "x" * 64, "a:b", "a b", "é", 1, b"a"]),
        "regions": (
            [[GOOD_REGION], [LARGEST_REGION] * 1024],
            [[], [GOOD_REGION] * 1025, [[0, 0, 12]], [[0, 2**40 + 1, 12]], [[0, 1, 11]], [[0, 1, 31]], [[0, 1]], {}],
        ),
    }
    return forms[form]


def documented_messages() -> dict[str, tuple[str, dict[str, str]]]:
    """Of each message, who sends it, and the form of its fields."""
    messages: dict[str, tuple[str, dict[str, str]]] = {}
    for name, sender, field, form, _ in rows(section(PROTOCOL, "messages")):
        if name:
            latest = messages[name] = (sender, {})
        if field:
            latest[1][field] = form
    return messages


def senders(kind: type[wire.Message]) -> str:
    if kind in (wire.LaneHello, wire.LaneWelcome):  # not part of the conversation
        return "source" if kind is wire.LaneHello else "destination"
    who = {speaker.value for (_, speaker), allowed in TRANSITIONS.items() if kind in allowed}
    return "either" if len(who) == 2 else who.pop()


def test_messages_are_those_of_the_wire() -> None:
    documented = documented_messages()
    assert list(documented) == list(wire.MESSAGES)
    for name, kind in wire.MESSAGES.items():
        sender, fields = documented[name]
        assert sender == senders(kind), name
        assert list(fields) == list(kind.CHECKS), name


@pytest.mark.parametrize("name", wire.MESSAGES)
def test_fields_have_the_documented_bounds(name: str) -> None:
    _, fields = documented_messages()[name]
    sound = {field: values(form)[0][0] for field, form in fields.items()}
    wire.decode_untrusted(msgpack.packb({"type": name, "not known": 1} | sound))
    for field, form in fields.items():
        good, bad = values(form)
        for value in good:
            wire.decode_untrusted(msgpack.packb({"type": name} | sound | {field: value}))
        for value in bad:
            with pytest.raises(ProtocolError, match=f"bad {field}|exceeds max"):
                wire.decode_untrusted(msgpack.packb({"type": name} | sound | {field: value}))
        without = msgpack.packb({"type": name} | {key: sound[key] for key in sound if key != field})
        if field == "verify":
            assert getattr(wire.decode_untrusted(without), field) is False
            continue
        with pytest.raises(ProtocolError, match=f"bad {field}|exceeds max"):
            wire.decode_untrusted(without)


def test_the_conversation_is_that_of_the_code() -> None:
    documented = {}
    for name, *cells in rows(section(PROTOCOL, "transitions")):
        phase = Phase[name.upper()]
        for speaker, cell in zip((Role.SOURCE, Role.DESTINATION), cells, strict=True):
            steps = [step.partition(" → ") for step in cell.split(", ") if step]
            documented[phase, speaker] = {
                wire.MESSAGES[message]: Phase[to.upper()] if to else phase for message, _, to in steps
            }
    assert {key: steps for key, steps in documented.items() if steps} == {k: v for k, v in TRANSITIONS.items() if v}


def test_message_examples() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert b"".join(hex_after(PROTOCOL, "and the version as 16 bits")) == wire.preamble()
    assert b"".join(hex_after(PROTOCOL, '`{"type": "go"}`')) == wire.encode(wire.Go())
    regions = [[0, 262144, 12], [1 << 32, 512, 21]]
    hello = wire.Hello("vm-7", epoch=0, token=b"", lanes=2, checksum=True, regions=regions)
    assert b"".join(hex_after(PROTOCOL, "A `hello` for two regions")) == wire.encode(hello)


def test_runs_example() -> None:
    (code,) = hex_after(PROTOCOL, "from `start` 0, are")
    pages = [(3, 3), (200, 1), (1000, 65536)]
    assert list(runs.encode(pages)) == [(0, code)]
    assert runs.decode_untrusted(0, code, 1 << 20) == pages


# Frames


def encoded(kind: int, first: int, count: int, region: int = 0, payload: bytes = b"") -> bytes:
    """A frame's header, with its checksums."""
    frame = ffi.new("struct gm_frame *")
    frame.kind, frame.flags, frame.region, frame.first, frame.count = kind, lib.GM_FRAME_CRC, region, first, count
    frame.length, frame.crc = len(payload), crc32c(payload)
    out = ffi.new("unsigned char[]", lib.GM_HEADER_BYTES)
    lib.gm_frame_encode(frame, out)
    return bytes(ffi.buffer(out))


def test_frame_examples() -> None:
    page = bytes(range(256)) * 16
    assert hex_after(PROTOCOL, "Examples with CRCs") == [
        encoded(lib.GM_KIND_REQUEST, 0x1234, 1, region=1),
        encoded(lib.GM_KIND_PAGES, 0x1234, 1, region=1, payload=page),
        encoded(lib.GM_KIND_ZERO, 64, 64),
        encoded(lib.GM_KIND_BEAT, 0, 0),
    ]


def unpack(data: bytes, table: list[Row]) -> list[int]:
    """The numbers that a table of offsets and types finds in some bytes."""
    forms = {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}
    return [struct.unpack_from(forms[form], data, leading(at))[0] for at, form, _ in table if form in forms]


def test_frame_layout() -> None:
    payload = b"x" * PAGE
    header = encoded(lib.GM_KIND_PAGES, 0x0102030405, 1, region=0x0607, payload=payload)
    expected = [0x4D47, 2, 1, 0x0607, 0, 0x0102030405, 1, PAGE, crc32c(payload), crc32c(header[:28])]
    assert unpack(header, table_after(PROTOCOL, "## Page lanes")) == expected


@pytest.mark.parametrize("shift", [12, 21])
def test_frames_carry_as_many_pages_as_documented(shift: int) -> None:
    kinds = {int(kind): pages for kind, _, _, pages, _ in table_after(PROTOCOL, "| 28")}
    assert kinds[1] == kinds[2] == "1…64 of 4 KiB, or 1 of a larger size"
    most = 64 if shift == 12 else 1
    region = Region(offset=0, size=128 << shift, page_size=1 << shift, gpa=0)
    file = os.memfd_create("region")
    frame = ffi.new("struct gm_frame *")
    with Memory("docs", [region], [file]) as memory:

        def decode(count: int) -> None:
            header = encoded(lib.GM_KIND_REQUEST, 0, count)
            check(lib.gm_frame_decode_untrusted, header, memory.native, 0, 1, b"urgent lane", frame)

        decode(most)
        for count in (0, most + 1):
            with pytest.raises(ProtocolError):
                decode(count)
    os.close(file)


def test_times_and_limits_are_those_of_the_code() -> None:
    settings = LinkSettings()
    for _, default, key in table_after(PROTOCOL, "## Signs of life"):
        assert float(default.removesuffix(" s")) == getattr(settings, key.strip("`")), key
    limits = {name: value for name, value, _ in table_after(PROTOCOL, "## Limits")}
    assert limits["body of a message"] == f"{wire.MAX_MESSAGE >> 10} KiB"
    assert limits["piece of state"] == f"{wire.STATE_PIECE >> 10} KiB"
    assert limits["pages of a frame"] == str(lib.GM_FRAME_PAGES)
    assert limits["payload of a frame"] == f"{(1 << lib.GM_MAX_PAGE_SHIFT) >> 20} MiB"
    assert limits["digests of a message"] == str(wire.DIGESTS)
    assert limits["background lanes"] == str(wire.MAX_LANES)
    assert limits["waits at a time"] == str(lib.GM_MAX_WAITS)


# The state


@pytest.fixture
def state() -> Iterator[tuple[Memory, bytes]]:
    """Memory of two regions, and its state, all of it filled in."""
    file = os.memfd_create("regions")
    descriptors = [file] * 9
    regions = [
        Region(offset=0, size=100 * PAGE, page_size=PAGE, gpa=0x1000, hva=0x2000, file=3, uffd=4),
        Region(offset=100 * PAGE, size=200 * PAGE, page_size=PAGE, gpa=0x8000, hva=0x9000, file=5, uffd=6),
    ]
    with Memory("the-id", regions, descriptors, descriptors) as memory:
        memory.set_populate(0, Populate.WRITE)
        for value, note in enumerate(Note, 11):
            memory.set_note(note, value)
        size = os.fstat(memory.state_fd).st_size
        with mmap.mmap(memory.state_fd, size) as state:
            yield memory, state[:]
    os.close(file)


def test_state_layout(state: tuple[Memory, bytes]) -> None:
    _, data = state
    table = rows(section(STATE, "state"))
    at = {what: int(offset) for offset, _, what in table}
    assert data[: at["version"]] == b"GMSTATE\0"
    messages = len(data) - 64 * 32
    assert unpack(data, table) == [2, 2, len(data), *range(11, 17), messages]
    assert data[at["the migration's id, the rest zero"] :][:64] == b"the-id".ljust(64, b"\0")
    assert messages == 856 + 2 * 128 + 2 * 8 * (2 + 4)
    assert [int(offset) for offset, *_ in table][-5:] == [136, 336, 592, 600, 856]
    assert not any(data[136:592] + data[600:856])


def test_state_of_a_region(state: tuple[Memory, bytes]) -> None:
    _, data = state
    first, second = (unpack(data[856 + 128 * i :], rows(section(STATE, "region"))) for i in (0, 1))
    bitmaps = 856 + 2 * 128
    assert first == [0, 100, 0x1000, 0x2000, 12, 3, 4, 1, bitmaps, bitmaps + 16, 0, 0, 0]
    assert second == [100 * PAGE, 200, 0x8000, 0x9000, 12, 5, 6, 0, bitmaps + 32, bitmaps + 64, 0, 0, 0]


# Files, links and names


def documents() -> list[Path]:
    return [TREE / "README.md", *sorted(DOCS.glob("*.md"))]


def test_links_lead_somewhere() -> None:
    for path in documents():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"


def test_named_tests_exist() -> None:
    """concurrency.md names the tests that show what it says."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (DOCS / "concurrency.md").read_text())
    assert named
    for file, name in named:
        (path,) = (TREE / "tests").rglob(file)
        functions = {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, f"{file}::{name}"


def test_named_c_functions_exist() -> None:
    sources = "".join(path.read_text() for path in (TREE / "gmemd/native").glob("*.[ch]"))
    for name in re.findall(r"`(gm_\w+)\(\)`", (DOCS / "concurrency.md").read_text()):
        assert re.search(rf"\b{name}\(", sources), name


def test_readme_shows_the_example() -> None:
    shown = section(TREE / "README.md", "example")
    assert shown == f"```python\n{EXAMPLE.read_text()}```\n"
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_second_source_stands_alone() -> None:
    text = SECOND_SOURCE.read_text()
    assert len(text.splitlines()) <= 200
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {"msgpack"}


# Whole processes


@contextmanager
def running(*arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this Python, killed at the end if it has not ended."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A daemon that is ready: its hand-off socket, and where sources come to."""
    config = tmp_path / "gmemd.toml"
    handoff, status_socket, notify = (tmp_path / name for name in ("gmemd.sock", "status.sock", "notify.sock"))
    config.write_text(
        f'[daemon]\nsocket = "{handoff}"\nstatus_socket = "{status_socket}"\n[network]\nlisten = "127.0.0.1:0"\n'
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.settimeout(PATIENCE)
        ready.bind(str(notify))
        with running("-m", "gmemd.cli", "serve", f"--config={config}", NOTIFY_SOCKET=str(notify)) as process:
            while b"READY=1" not in ready.recv(PAGE):
                pass
            ready.close()  # so that the daemon does not wait until somebody reads what it says later
            told = status.ask(status_socket, {"command": "status"})
            yield handoff, told["listen"]
            process.terminate()
            assert process.wait(PATIENCE) == 0


@pytest.fixture
def memory_file(tmp_path: Path, rng: random.Random) -> Path:
    """Memory with zero pages in it, and a hole at its end."""
    path = tmp_path / "memory"
    with path.open("wb") as file:
        for _ in range(256):
            file.write(rng.randbytes(PAGE) if rng.random() < 0.8 else bytes(PAGE))
        file.truncate(512 * PAGE)
    return path


@pytest.fixture
def require_userfaultfd() -> None:
    try:
        os.close(os.open("/dev/userfaultfd", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/userfaultfd: {error.strerror}")


def source_of_ours(listen: str, migration: str, file: Path) -> list[str]:
    return ["-m", "gmemd.source_cli", listen, f"--migration={migration}", f"--file={file}"]


def second_source(listen: str, migration: str, file: Path) -> list[str]:
    host, _, port = listen.rpartition(":")
    return [str(SECOND_SOURCE), host, port, migration, str(file)]


@pytest.mark.usefixtures("require_userfaultfd")
@pytest.mark.parametrize("source", [source_of_ours, second_source])
def test_example_receives_what_a_source_sends(
    daemon: tuple[Path, str], memory_file: Path, source: Callable[[str, str, Path], list[str]]
) -> None:
    handoff, listen = daemon
    size = memory_file.stat().st_size
    with (
        running(str(EXAMPLE), str(handoff), "docs", str(size)) as vmm,
        running(*source(listen, "docs", memory_file)) as sender,
    ):
        said = vmm.communicate(timeout=PATIENCE)[0].splitlines()
        assert sender.wait(PATIENCE) == 0
        assert vmm.returncode == 0
    assert said[1] == hashlib.sha256(memory_file.read_bytes()).hexdigest()
    assert json.loads(said[2]) == {"done": True, "pages": size // PAGE}
