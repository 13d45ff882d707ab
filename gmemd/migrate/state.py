"""The conversation on a control lane, as a table. Both ends run both roles through the same table: what we send is
held to the same rules as what we receive.

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
    SWITCHING = auto()  # the guest may stop at the source
    SENDING = auto()  # the guest runs at the destination
    PUSHED = auto()  # all has been sent once
    ENDED = auto()


S, D = Role.SOURCE, Role.DESTINATION

TRANSITIONS: dict[tuple[Phase, Role], dict[type[Message], Phase]] = {
    (Phase.NEW, S): {wire.Hello: Phase.GREETED},
    (Phase.GREETED, D): {
        wire.Waiting: Phase.GREETED,
        wire.Welcome: Phase.JOINING,
        wire.Refused: Phase.ENDED,
        wire.Complete: Phase.ENDED,
        wire.Failed: Phase.ENDED,
    },
    (Phase.JOINING, S): {wire.Beat: Phase.JOINING},
    (Phase.JOINING, D): {
        wire.Beat: Phase.JOINING,
        wire.Received: Phase.JOINING,
        wire.Go: Phase.SWITCHING,
        wire.Complete: Phase.ENDED,
        wire.Failed: Phase.ENDED,
    },
    (Phase.SWITCHING, S): {
        wire.Beat: Phase.SWITCHING,
        wire.State: Phase.SWITCHING,
        wire.Switch: Phase.SENDING,
        wire.Failed: Phase.ENDED,
    },
    (Phase.SWITCHING, D): {wire.Beat: Phase.SWITCHING, wire.Failed: Phase.ENDED},
    (Phase.SENDING, S): {wire.Beat: Phase.SENDING, wire.Zero: Phase.SENDING, wire.Pushed: Phase.PUSHED},
    (Phase.SENDING, D): {wire.Beat: Phase.SENDING, wire.Complete: Phase.ENDED, wire.Failed: Phase.ENDED},
    (Phase.PUSHED, S): {wire.Beat: Phase.PUSHED},
    (Phase.PUSHED, D): {
        wire.Beat: Phase.PUSHED,
        wire.Received: Phase.PUSHED,
        wire.Go: Phase.SENDING,
        wire.Complete: Phase.ENDED,
        wire.Failed: Phase.ENDED,
    },
}


class Conversation:
    """Follows one control lane from either end."""

    def __init__(self) -> None:
        self.phase = Phase.NEW
        self.switched = False

    def step(self, speaker: Role, message: Message) -> None:
        """Takes a message of `speaker`; ProtocolError if it may not say that now."""
        allowed = TRANSITIONS.get((self.phase, speaker), {})
        kind = type(message)
        if kind not in allowed:
            raise ProtocolError(
                f"control lane: {wire.NAMES[kind]} while {self.phase.name.lower()}: sent by the {speaker.value}"
            )
        self.phase = allowed[kind]
        if isinstance(message, wire.Welcome):
            self.switched = message.switched
        elif isinstance(message, wire.Switch):
            self.switched = True
        if self.phase is Phase.SWITCHING and self.switched:
            self.phase = Phase.SENDING
