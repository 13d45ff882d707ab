"""A guest moves on memfd, which each kernel of the matrix can do."""

import pytest
from support.guest_memfd import moved


@pytest.mark.usefixtures("require_kvm")
def test_a_guest_moves_on_memfd() -> None:
    said = moved("--backing=memfd")
    assert (said["slot"], said["vcpu_exits"]) == ("plain", 0)
    assert said["faults"] > 0
