"""Strategies for every message of the control lane."""

from hypothesis import strategies as st

from gmemd.migrate import wire

IDS = st.text("abcXYZ019-_.", min_size=1, max_size=wire.MAX_ID)
TEXTS = st.text(max_size=wire.MAX_TEXT)
TOKENS = st.binary(min_size=wire.TOKEN_BYTES, max_size=wire.TOKEN_BYTES)
EPOCHS = st.integers(1, wire.MAX_EPOCH)
REGION = st.tuples(st.integers(0, 2**63), st.integers(1, 2**40), st.integers(12, 30)).map(list)
COUNTS = st.integers(0, 2**44)
PAGES = {
    "region": st.integers(0, wire.MAX_REGIONS - 1),
    "start": st.integers(0, 2**40),
    "runs": st.binary(max_size=999),
}

BY_TYPE: dict[type[wire.Message], st.SearchStrategy[wire.Message]] = {
    wire.Hello: st.builds(
        wire.Hello,
        migration=IDS,
        epoch=st.integers(0, wire.MAX_EPOCH),
        token=st.just(b"") | TOKENS,
        lanes=st.integers(1, wire.MAX_LANES),
        checksum=st.booleans(),
        regions=st.lists(REGION, min_size=1, max_size=8),
        verify=st.booleans(),
    ),
    wire.Welcome: st.builds(
        wire.Welcome,
        epoch=EPOCHS,
        token=TOKENS,
        checksum=st.booleans(),
        switched=st.booleans(),
        verify=st.booleans(),
    ),
    wire.LaneHello: st.builds(
        wire.LaneHello, migration=IDS, epoch=EPOCHS, lane=st.integers(0, wire.MAX_LANES), token=TOKENS
    ),
    wire.LaneWelcome: st.builds(wire.LaneWelcome),
    wire.Waiting: st.builds(wire.Waiting),
    wire.Refused: st.builds(wire.Refused, why=TEXTS),
    wire.Received: st.builds(wire.Received, **PAGES),
    wire.Go: st.builds(wire.Go),
    wire.State: st.builds(wire.State, piece=st.binary(max_size=999)),
    wire.Switch: st.builds(wire.Switch, size=st.integers(0, 2**32)),
    wire.Zero: st.builds(wire.Zero, **PAGES),
    wire.Pushed: st.builds(wire.Pushed),
    wire.Beat: st.builds(wire.Beat),
    wire.Complete: st.builds(wire.Complete, pages=st.integers(0, 2**44)),
    wire.Digests: st.builds(
        wire.Digests,
        region=st.integers(0, wire.MAX_REGIONS - 1),
        first=st.integers(0, 2**40),
        digests=st.binary(max_size=999),
    ),
    wire.Verified: st.builds(
        wire.Verified,
        verified=COUNTS,
        left_out=COUNTS,
        mismatches=COUNTS,
        region=st.integers(0, wire.MAX_REGIONS - 1),
        page=st.integers(0, 2**40),
    ),
    wire.Failed: st.builds(wire.Failed, why=TEXTS),
}
ANY = st.one_of(*BY_TYPE.values())
