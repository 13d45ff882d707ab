"""A guest moves on guest_memfd, in either slot. The longer tests of it are in tests/test_guest_memfd.py."""

import pytest
from support.guest_memfd import moved, need

pytestmark = pytest.mark.lab


def test_a_guest_moves_in_a_plain_slot() -> None:
    need("guest_memfd")
    said = moved()
    assert (said["populate"], said["slot"], said["vcpu_exits"]) == ("write", "plain", 0)
    assert said["faults"] > 0


def test_a_guest_moves_in_a_slot_with_userfault() -> None:
    need("guest_memfd_userfault")
    said = moved("--slot=guest_memfd")
    assert (said["populate"], said["slot"]) == ("write", "guest_memfd")
    assert said["faults"] == said["vcpu_exits"] > 0
    assert said["vcpu_exits"] < said["pages"] / 2, "what came in the background stops no vCPU"
