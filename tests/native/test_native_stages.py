"""Stages of faults: a file of stamps comes back as it was, and from stamps come the faults that were."""

from pathlib import Path

import pytest
from native_frames import pages
from native_rig import Guest, Task, content, paged

from gmemd import stages
from gmemd.errors import DataError
from gmemd.stages import Stage

DESTINATION = [Stage.READ, Stage.ASKED, Stage.ARRIVED, Stage.POPULATED, Stage.CONTINUED]


def stamp(time: int, stage: Stage, page: int = 0, region: int = 0) -> tuple[int, Stage, int, int]:
    return time, stage, region, page


def test_every_stage_of_a_fault_is_stamped_in_turn(tmp_path: Path) -> None:
    """Those that the destination sees, for two faults one after the other; in one region and in another."""
    file = tmp_path / "made" / f"m{stages.SUFFIX}"
    with Guest((8, 4096), (8, 4096)) as guest:
        guest.memory.time_stages()
        with paged(guest) as far:
            for region, page in (0, 3), (1, 5):
                reader = Task(guest.read, page, region)
                assert far.requested() == (region, page, 1)
                far.send(pages(region, page, content(page, region)))
                reader.result()
        stages.write(file, guest.memory)
    found = stages.faults(stages.read([file]))
    assert [(fault.region, fault.page) for fault in found] == [(0, 3), (1, 5)]
    for fault in found:
        assert list(fault.at) == DESTINATION
        assert list(fault.at.values()) == sorted(fault.at.values())
    assert found[0].at[Stage.CONTINUED] <= found[1].at[Stage.READ]


def test_nothing_is_stamped_unless_asked_for() -> None:
    with Guest() as guest, paged(guest) as far:
        reader = Task(guest.read, 1)
        far.requested()
        far.send(pages(0, 1, content(1)))
        reader.result()
        assert guest.memory.stages() == b""


def test_a_send_belongs_to_all_that_came_before_it() -> None:
    """And a fault whose page came some other way is none of ours."""
    made = [
        stamp(1000, Stage.READ, 7),
        stamp(2000, Stage.READ, 8),
        stamp(3000, Stage.ASKED),
        stamp(4000, Stage.READ, 9),
        stamp(5000, Stage.ASKED),
        *(stamp(9000 + page, stage, page) for page in (7, 8) for stage in DESTINATION[2:]),
    ]
    found = stages.faults(made)
    assert [(fault.page, fault.at[Stage.READ], fault.at[Stage.ASKED]) for fault in found] == [
        (7, 1000, 3000),
        (8, 2000, 3000),
    ]
    told = stages.summary(found)
    assert told["faults"] == 2
    assert told["steps"]["asked"] == {"mean_us": 1.5, "p50_us": 1.5}
    assert "→ request made" in stages.picture(told)


@pytest.mark.parametrize("wrong", [b"", b"x" * 40, stages.HEADER.pack(stages.MAGIC, 1, 1)], ids=["empty", "x", "short"])
def test_what_is_no_file_of_stamps_is_refused(tmp_path: Path, wrong: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(wrong)
    with pytest.raises(DataError, match=r"^.*/file: not a whole file of stamps"):
        stages.read([file])
