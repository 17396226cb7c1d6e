"""One seed, one case: a finding is an AssertionError that says what differs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from random import Random
from typing import Any, Final

from pamqp import decode

from eventbus.message import Message
from eventbus.transport.rabbitmq import frames
from tests.fuzz import making, reading
from tests.fuzz.lanes import Lanes, Pair, ids_in

HANG_S: Final = 60  # a case takes a hundredth of a second


class Hang(BaseException):  # nothing that catches an Exception may take it for one of its own
    """The case does not end."""


@contextlib.contextmanager
def no_hang(limit_s: float = HANG_S) -> Iterator[None]:
    """Raise `Hang` where the block takes longer, whatever it is doing."""

    def interrupt(_signal: int, _frame: Any) -> None:
        raise Hang(f"it did not end within {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Case:
    """One seed's. `data` is what was read when it failed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self.data = b""
        self.frames = 0  # compared with what pamqp reads

    async def run(self, pair: Pair) -> None:
        """Raises AssertionError for a finding, and whatever else the lane let through."""
        with no_hang():
            kind = self._random.random()
            if kind < 0.8:
                await self._stream(pair)
            elif kind < 0.9:
                await self._damaged_stream()
            else:
                self._damaged_table()

    async def _stream(self, pair: Pair) -> None:
        """What a broker sends is read as pamqp reads it, however it is cut."""
        random = self._random
        lanes = await Lanes.open(pair)
        messages = [_message(random) for _ in range(random.randrange(8))]
        written = await lanes.publish(messages)
        _check_written(written, messages)
        ids = ids_in(written)
        data = self.data = b"".join(making.stream(random, ids, random.randint(1, 40)))
        expected = reading.read(data, ids)

        lanes.feed(data, making.cuts(random, len(data)))

        self.frames = expected.frames
        assert lanes.reason is None, f"the session ended: {lanes.reason!r}"
        _same("deliveries", lanes.deliveries(), expected.deliveries)
        _same("passed on", await lanes.passed_on(), expected.passed_on)
        _same("confirms", await lanes.outcomes(), expected.confirms)

    async def _damaged_stream(self) -> None:
        """Garbage ends the session or goes to the client, and is the same however it is cut."""
        random = self._random
        whole = b"".join(making.stream(random, ["0" * 32], random.randint(1, 20)))
        data = self.data = making.damaged(random, whole)

        outcomes = []
        for places in ([len(data)], making.cuts(random, len(data))):
            pair = await Pair.open()  # of its own, as garbage ends it
            lanes = await Lanes.open(pair)
            await lanes.publish([Message({}, b"")])
            lanes.feed(data, places)
            so_far = (type(lanes.reason), lanes.deliveries())  # its text may tell what came behind, too
            # The longest frame that may still be due, and none of it ends as one: now at the latest it is seen.
            lanes.feed(noise := b"\xff" * (making.FRAME_MAX + 8), [len(noise)])
            assert not lanes.is_live, "the session goes on after garbage"
            outcomes.append((*so_far, await lanes.passed_on(), await lanes.outcomes()))
            await pair.close()

        _same("outcomes of two cuts", outcomes[1], outcomes[0])

    def _damaged_table(self) -> None:
        """Malformed, or what pamqp reads, or what it cannot read; and written again as it came."""
        random = self._random
        data = self.data = making.entries(random)
        if random.random() < 0.7:
            data = self.data = making.damaged(random, data)
        try:
            table = frames.read_table(data, 0, len(data))
        except frames.Malformed:
            return
        with contextlib.suppress(ValueError, OverflowError):  # a timestamp that is no moment
            _same("table", repr(table.values), repr(decode.field_table(making.sized(data))[1]))
        with contextlib.suppress(ValueError):  # a name that is longer than the client writes
            written = frames.write_plain(table.values, table.foreign)
            assert written is not None, "it is not written again"
            again = frames.read_table(written, 4, len(written))
            _same("written again", repr(again.values), repr(table.values))
            _same("kept as it came", again.foreign, table.foreign)


def _message(random: Random) -> Message:
    headers: dict[str, object] = {
        making.text(random): random.choice((making.text(random), True, False, random.getrandbits(40) - 2**39))
        for _ in range(random.randrange(4))
    }
    size = random.choice((0, 1, random.randrange(300), random.randrange(2 * making.FRAME_MAX)))
    return Message(headers, random.randbytes(size), random.choice((None, "application/json")))


def _check_written(written: bytes, messages: list[Message]) -> None:
    """pamqp reads what was meant."""
    read: list[tuple[Any, ...]] = []
    for _, channel, what in reading.split(written):
        assert channel == making.PUBLISHING
        match what.name:
            case "Basic.Publish":
                assert (what.exchange, what.routing_key, what.mandatory) == ("events", "fact.v1", True)
            case "ContentHeader":
                sent = what.properties
                assert sent.delivery_mode == 2
                read.append((what.body_size, dict(sent.headers or {}), sent.content_type, b""))
            case _:
                *before, body = read[-1]
                read[-1] = (*before, body + what.value)
    meant = [(len(one.body), dict(one.headers), one.content_type, one.body) for one in messages]
    _same("written", repr(read), repr(meant))


def _same(what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise AssertionError(f"{what} differ\nours:   {_cut(ours)}\npamqp's: {_cut(theirs)}")


def _cut(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 4000 else f"{shown[:4000]}… ({len(shown)} characters)"
