"""The short form of `make fuzz`: a few hundred fresh cases; and that it finds what is there to be found."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from eventbus.transport.rabbitmq import frames
from tests.fuzz import making, reading
from tests.fuzz.cases import Case, Hang, no_hang
from tests.fuzz.lanes import Lanes, Pair

ROOT = Path(__file__).parents[2]


def test_a_few_hundred_random_cases_are_read_as_the_client_reads_them() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--frames", "10000", "--seconds", "120"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert "no finding" in done.stdout
    assert "frames/s" in done.stdout


async def test_a_fault_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = frames.read_deliver

    def wrong(data: bytes, at: int, end: int) -> tuple[int, bool, str, str]:
        tag, is_redelivered, exchange, key = right(data, at, end)
        return tag, is_redelivered and tag != 3, exchange, key

    monkeypatch.setattr(frames, "read_deliver", wrong)
    pair = await Pair.open()

    async def run() -> None:
        for seed in range(500):
            await Case(seed).run(pair)

    with pytest.raises(AssertionError, match="deliveries differ"):
        await run()
    await pair.close()


def test_what_does_not_end_is_a_finding() -> None:
    @no_hang(0.05)
    def hang() -> None:
        while True:
            with suppress(Exception):
                time.sleep(1)

    with pytest.raises(Hang):
        hang()


def test_a_seed_is_always_the_same_bytes() -> None:
    one, other = (b"".join(making.stream(random.Random(7), ["id"], 30)) for _ in range(2))

    assert one == other
    assert reading.read(one, ["id"]).frames > 30


async def test_what_was_found_once_is_not_found_again() -> None:
    pair = await Pair.open()
    for seed in (2699321102,):  # a method frame of no bytes, where the cut was: it was read beyond its end
        await Case(seed).run(pair)
    await pair.close()


@pytest.mark.parametrize("size", range(4))
async def test_a_method_frame_that_is_too_short_for_one_is_the_clients_wherever_it_is_cut(size: int) -> None:
    pair = await Pair.open()
    data = b"".join(
        b"\x01" + channel.to_bytes(2, "big") + size.to_bytes(4, "big") + b"\x00\x3c\x00\x3c"[:size] + b"\xce"
        for channel in (*making.CONSUMING, making.PUBLISHING)
    )

    for places in (range(1, len(data) + 1), [len(data)], [7 + size + 1, len(data)]):
        lanes = await Lanes.open(pair)
        lanes.feed(data, places)

        assert lanes.is_live
        assert await lanes.passed_on() == data
    await pair.close()


async def test_every_byte_alone_is_the_same_as_all_at_once() -> None:
    pair = await Pair.open()
    data = b"".join(making.stream(random.Random(11), [], 60))
    expected = reading.read(data, [])

    for places in (range(1, len(data) + 1), [len(data)]):
        lanes = await Lanes.open(pair)
        lanes.feed(data, places)

        assert lanes.deliveries() == expected.deliveries
        assert await lanes.passed_on() == expected.passed_on
    assert len(expected.deliveries) > 10
    assert len(expected.passed_on) > 1000
    await pair.close()
