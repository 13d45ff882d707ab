"""The conversation of a control lane, from both ends, with messages on their way in both directions."""

from collections import deque
from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gmemd.errors import ProtocolError
from gmemd.migrate import wire
from gmemd.migrate.state import TRANSITIONS, Conversation, Phase, Role

S, D = Role.SOURCE, Role.DESTINATION
TOKEN = bytes(wire.TOKEN_BYTES)

EXAMPLES: dict[type[wire.Message], wire.Message] = {
    type(message): message
    for message in (
        wire.Hello("m", 0, b"", 1, True, [[0, 1, 12]]),
        wire.Welcome(1, TOKEN, True, False),
        wire.LaneHello("m", 1, 0, TOKEN),
        wire.LaneWelcome(),
        wire.Waiting(),
        wire.Refused("no"),
        wire.Received(0, 0, b""),
        wire.Go(),
        wire.State(b"x"),
        wire.Switch(1),
        wire.Zero(0, 0, b""),
        wire.Pushed(),
        wire.Beat(),
        wire.Complete(1),
        wire.Digests(0, 0, bytes(4)),
        wire.Verified(1, 0, 0, 0, 0),
        wire.Failed("end"),
    )
}
WELCOME_BACK = wire.Welcome(2, TOKEN, True, True)

HELLO = [(S, EXAMPLES[wire.Hello])]
JOINING = [*HELLO, (D, EXAMPLES[wire.Waiting]), (D, EXAMPLES[wire.Welcome])]
SWITCHING = [*JOINING, (D, EXAMPLES[wire.Received]), (D, EXAMPLES[wire.Go])]
SENDING = [*SWITCHING, (S, EXAMPLES[wire.State]), (S, EXAMPLES[wire.Switch])]
PUSHED = [*SENDING, (S, EXAMPLES[wire.Zero]), (S, EXAMPLES[wire.Pushed])]
WAYS_TO: dict[Phase, list[tuple[Role, wire.Message]]] = {
    Phase.NEW: [],
    Phase.GREETED: HELLO,
    Phase.JOINING: JOINING,
    Phase.REJOINING: [*HELLO, (D, WELCOME_BACK)],
    Phase.SWITCHING: SWITCHING,
    Phase.SENDING: SENDING,
    Phase.PUSHED: PUSHED,
    Phase.ENDED: [*PUSHED, (D, EXAMPLES[wire.Complete])],
}


def after(said: Iterable[tuple[Role, wire.Message]]) -> Conversation:
    conversation = Conversation()
    for speaker, message in said:
        conversation.step(speaker, message)
    return conversation


def test_every_phase_can_be_reached() -> None:
    assert {phase: after(way).phase for phase, way in WAYS_TO.items()} == {phase: phase for phase in Phase}


@pytest.mark.parametrize(("phase", "speaker"), list(product(Phase, Role)))
def test_what_is_not_in_the_table_is_refused_by_name(phase: Phase, speaker: Role) -> None:
    for kind in set(EXAMPLES) - set(TRANSITIONS.get((phase, speaker), {})):
        conversation = after(WAYS_TO[phase])
        told = f"^control lane: {wire.NAMES[kind]} while {phase.name.lower()}: sent by the {speaker.value}$"
        with pytest.raises(ProtocolError, match=told):
            conversation.step(speaker, EXAMPLES[kind])
        assert conversation.phase is phase


def allowed_in(speaker: Role, kind: type[wire.Message]) -> set[Phase]:
    return {phase for (phase, who), kinds in TRANSITIONS.items() if who is speaker and kind in kinds}


def test_what_the_table_is_for() -> None:
    """What must never be possible, said without the table."""
    assert allowed_in(S, wire.Hello) == {Phase.NEW}
    assert allowed_in(S, wire.Switch) - {Phase.ENDED} == {Phase.SWITCHING}
    before_the_guest_has_left = {Phase.JOINING, Phase.SWITCHING}
    assert not before_the_guest_has_left & allowed_in(D, wire.Complete)
    assert not before_the_guest_has_left & allowed_in(S, wire.Zero)
    for of_page_lanes in (wire.LaneHello, wire.LaneWelcome):
        assert not allowed_in(S, of_page_lanes) | allowed_in(D, of_page_lanes)
    for answer in (wire.Welcome, wire.Waiting):
        assert allowed_in(D, answer) == {Phase.GREETED}
        assert not allowed_in(S, answer)


def test_a_guest_that_has_left_is_not_switched_again() -> None:
    conversation = after([*WAYS_TO[Phase.REJOINING], (D, EXAMPLES[wire.Go])])
    assert conversation.phase is Phase.SENDING


def test_lost_pages_are_sent_again() -> None:
    conversation = after([*PUSHED, (D, EXAMPLES[wire.Received]), (D, EXAMPLES[wire.Go]), (S, EXAMPLES[wire.Pushed])])
    assert conversation.phase is Phase.PUSHED


class Crossing(RuleBasedStateMachine):
    """Two ends that say whatever the table lets them, and hear it any time later, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = {role: Conversation() for role in Role}
        self.on_the_way: dict[Role, deque[wire.Message]] = {role: deque() for role in Role}

    def says(self, speaker: Role, message: wire.Message) -> None:
        self.ends[speaker].step(speaker, message)
        self.on_the_way[speaker].append(message)

    @precondition(lambda self: self.ends[S].phase is Phase.NEW)
    @rule()
    def source_greets(self) -> None:
        self.says(S, EXAMPLES[wire.Hello])

    @rule(data=st.data(), speaker=st.sampled_from(Role), switched=st.booleans())
    def speak(self, data: st.DataObject, speaker: Role, switched: bool) -> None:
        kinds = TRANSITIONS.get((self.ends[speaker].phase, speaker), {})
        if kinds:
            kind = data.draw(st.sampled_from([kind for kind in EXAMPLES if kind in kinds]))
            self.says(speaker, WELCOME_BACK if kind is wire.Welcome and switched else EXAMPLES[kind])

    @rule(speaker=st.sampled_from(Role))
    def hear(self, speaker: Role) -> None:
        if self.on_the_way[speaker]:
            listener = D if speaker is S else S
            self.ends[listener].step(speaker, self.on_the_way[speaker].popleft())

    @invariant()
    def both_agree_when_nothing_is_on_the_way(self) -> None:
        if not any(self.on_the_way.values()):
            assert self.ends[S].phase is self.ends[D].phase


Crossing.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestCrossing = Crossing.TestCase
