"""The conversation on a control lane, as a table. Both ends run both roles through the same table: what we send is
held to the same rules as what we receive. Messages cross on the way: what one end says may reach the other after that
one has gone on.

    source                          destination

    hello            ─────────▶
                     ◀─────────     waiting …, welcome          (or refused, or complete)
    (opens the page lanes)
                     ◀─────────     received …, go              all lanes are there
    state …, switch  ─────────▶                                 unless switched before
    zero …           ─────────▶
    (pages on the page lanes)
    pushed           ─────────▶
                     ◀─────────     received …, go              if something is still missing
    zero …, pushed   ─────────▶
                     ◀─────────     complete
    digests …        ─────────▶                                 if they compare
                     ◀─────────     verified

Either end may end it in between: the destination by refused or failed, the source by failed.
"""

from enum import Enum, auto

from gmemd.errors import ProtocolError
from gmemd.migrate import wire
from gmemd.migrate.wire import Message


class Role(Enum):
    SOURCE = "source"
    DESTINATION = "destination"


class Phase(Enum):
    """What the two have come to."""

    NEW = auto()
    GREETED = auto()  # the source has said hello
    JOINING = auto()  # the destination has said welcome; page lanes are opened
    REJOINING = auto()  # the same, and the guest runs at the destination already
    SWITCHING = auto()  # the guest may stop at the source
    SENDING = auto()  # the guest runs at the destination
    PUSHED = auto()  # all has been sent once
    ENDED = auto()


S, D = Role.SOURCE, Role.DESTINATION

TRANSITIONS: dict[tuple[Phase, Role], dict[type[Message], Phase]] = {
    (Phase.NEW, S): {wire.Hello: Phase.GREETED},
    (Phase.GREETED, D): {
        wire.Waiting: Phase.GREETED,
        wire.Welcome: Phase.JOINING,  # or REJOINING, as it says
        wire.Refused: Phase.ENDED,
        wire.Complete: Phase.ENDED,
        wire.Failed: Phase.ENDED,
    },
    (Phase.JOINING, S): {},
    (Phase.JOINING, D): {wire.Received: Phase.JOINING, wire.Go: Phase.SWITCHING},
    (Phase.REJOINING, S): {},
    (Phase.REJOINING, D): {wire.Received: Phase.REJOINING, wire.Go: Phase.SENDING, wire.Complete: Phase.ENDED},
    (Phase.SWITCHING, S): {wire.State: Phase.SWITCHING, wire.Switch: Phase.SENDING},
    (Phase.SWITCHING, D): {},
    (Phase.SENDING, S): {wire.Zero: Phase.SENDING, wire.Pushed: Phase.PUSHED},
    (Phase.SENDING, D): {wire.Complete: Phase.ENDED},
    (Phase.PUSHED, S): {},
    (Phase.PUSHED, D): {wire.Received: Phase.PUSHED, wire.Go: Phase.SENDING, wire.Complete: Phase.ENDED},
}
for (phase, speaker), allowed in TRANSITIONS.items():
    if phase not in (Phase.NEW, Phase.GREETED):
        allowed |= {wire.Beat: phase, wire.Failed: Phase.ENDED}
        allowed |= {wire.Refused: Phase.ENDED} if speaker is D else {}
# What was on its way when the other end ended it.
TRANSITIONS[Phase.ENDED, S] = dict.fromkeys(
    (wire.Beat, wire.State, wire.Switch, wire.Zero, wire.Pushed, wire.Digests, wire.Failed), Phase.ENDED
)
TRANSITIONS[Phase.ENDED, D] = dict.fromkeys(
    (wire.Beat, wire.Received, wire.Go, wire.Complete, wire.Verified, wire.Refused, wire.Failed), Phase.ENDED
)


class Conversation:
    """Follows one control lane from either end."""

    def __init__(self) -> None:
        self.phase = Phase.NEW

    def step(self, speaker: Role, message: Message) -> None:
        """Takes a message of `speaker`; ProtocolError if it may not say that now."""
        allowed = TRANSITIONS.get((self.phase, speaker), {})
        kind = type(message)
        if kind not in allowed:
            raise ProtocolError(
                f"control lane: {wire.NAMES[kind]} while {self.phase.name.lower()}: sent by the {speaker.value}"
            )
        self.phase = allowed[kind]
        if isinstance(message, wire.Welcome) and message.switched:
            self.phase = Phase.REJOINING
