"""Round trips of a shared store: what is asked for together goes together, and nobody keeps what they were not told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import pytest

from eventbus.errors import SetupError, StoreError
from eventbus.idempotency import MemoryStore, SharedStore
from eventbus.idempotency.base import KEEP_DONE, LEASE, Claim, Done, Mine, Theirs, digest
from eventbus.idempotency.shared import Change, Wish
from tests.rig import until


class Keeper:
    """Keeps keys in this process. It can be held up in the middle of a turn, and fail before or after it."""

    where = "nowhere://"

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.tokens: dict[tuple[str, str], str] = {}  # (key, our token) -> the memory store's
        self.turns: list[tuple[list[Wish], list[Change]]] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.fails: str | None = None  # "before" or "after" it was carried out
        self.refuses: Exception | None = None
        self.remarks: list[str] = []
        self.expired = 0
        self.cleaned: list[int] = []
        self.is_closed = False

    async def open(self) -> Sequence[str]:
        await self.goes_on.wait()
        if self.refuses is not None:
            raise self.refuses
        return self.remarks

    async def turn(
        self, token: str, wishes: Sequence[Wish], changes: Sequence[Change]
    ) -> tuple[dict[str, Claim], set[str]]:
        self.turns.append(([*wishes], [*changes]))
        if self.fails == "before":
            raise OSError("the wire is cut, and the text names ada@example.com")
        changed = {change.key for change in changes if await self._change(change)}
        claims = {wish.key: await self._claim(token, wish) for wish in wishes}
        await self.goes_on.wait()
        if self.fails == "after":
            raise OSError("the wire is cut")
        return claims, changed

    async def _claim(self, token: str, wish: Wish) -> Claim:
        claim = await self.store.claim(wish.key, timedelta(milliseconds=wish.lease_ms))
        if isinstance(claim, Mine):
            self.tokens[wish.key, token] = claim.token
            return Mine(token, claim.crashes)
        return claim

    async def _change(self, change: Change) -> bool:
        token, time = self.tokens.get((change.key, change.token), "none"), timedelta(milliseconds=change.ms)
        if change.is_held:
            return await self.store.renew(change.key, token, time)
        if not change.ms:
            return await self.store.free(change.key, token)
        return await self.store.complete(change.key, token, time)

    async def clean(self, at_most: int) -> int:
        if self.fails is not None:
            raise OSError("the wire is cut")
        self.cleaned.append(min(at_most, self.expired))
        self.expired -= self.cleaned[-1]
        return self.cleaned[-1]

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture
async def store(keeper: Keeper) -> AsyncIterator[SharedStore]:
    async with SharedStore(keeper) as store:
        yield store


async def claimed(store: SharedStore, key: str) -> Mine:
    claim = await store.claim(key, LEASE)
    assert isinstance(claim, Mine)
    return claim


def keys(turn: tuple[list[Wish], list[Change]]) -> tuple[set[str], set[str]]:
    return {wish.key for wish in turn[0]}, {change.key for change in turn[1]}


# ── what goes together ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_asked_for_in_one_turn_of_the_loop_is_one_round_trip(store: SharedStore, keeper: Keeper) -> None:
    a, b, c = [await claimed(store, key) for key in "abc"]
    keeper.turns.clear()

    answers = await asyncio.gather(
        store.claim("d", LEASE), store.renew("a", a.token, LEASE), store.complete("b", b.token, KEEP_DONE),
        store.free("c", c.token), store.claim("e", LEASE),
    )  # fmt: skip

    assert [type(answer) for answer in answers] == [Mine, bool, bool, bool, Mine]
    assert all(answers[1:4])
    assert [keys(turn) for turn in keeper.turns] == [({*map(digest, "de")}, {*map(digest, "abc")})]


async def test_what_is_asked_for_during_a_round_trip_goes_together_with_the_next(
    store: SharedStore, keeper: Keeper
) -> None:
    keeper.goes_on.clear()
    first = asyncio.create_task(store.claim("a", LEASE))
    await until(lambda: keeper.turns)
    later = [asyncio.create_task(store.claim(key, LEASE)) for key in "bcd"]
    await asyncio.sleep(0)
    assert len(keeper.turns) == 1

    keeper.goes_on.set()
    await asyncio.gather(first, *later)

    assert [len(wishes) for wishes, _ in keeper.turns] == [1, 3]


async def test_a_key_that_is_wanted_twice_at_once_is_wanted_once_of_the_keeper(
    store: SharedStore, keeper: Keeper
) -> None:
    mine, *others = await asyncio.gather(*(store.claim("a", LEASE) for _ in range(3)))

    assert isinstance(mine, Mine)
    assert others == [Theirs(LEASE), Theirs(LEASE)]
    assert [len(wishes) for wishes, _ in keeper.turns] == [1]


async def test_two_changes_of_a_key_at_once_are_made_in_turn(store: SharedStore, keeper: Keeper) -> None:
    mine = await claimed(store, "a")

    renewed, done, again = await asyncio.gather(
        store.renew("a", mine.token, LEASE),
        store.complete("a", mine.token, KEEP_DONE),
        store.complete("a", mine.token, KEEP_DONE),
    )

    assert (renewed, done, again) == (True, True, False)
    assert all(len(changes) <= 1 for _, changes in keeper.turns)


async def test_the_keeper_never_sees_a_key(store: SharedStore, keeper: Keeper) -> None:
    await claimed(store, "mail/welcome/user_registered/ada@example.com/\udcff")

    assert [len(wish.key) for wish in keeper.turns[0][0]] == [32]
    assert "ada" not in repr(keeper.turns)


# ── what nobody was told of ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_whose_caller_has_gone_is_given_back(store: SharedStore, keeper: Keeper) -> None:
    keeper.goes_on.clear()
    gone = asyncio.create_task(store.claim("a", LEASE))
    await until(lambda: keeper.turns)
    gone.cancel()
    await asyncio.wait((gone,))

    keeper.goes_on.set()
    await until(lambda: len(keeper.turns) == 2)

    assert (await claimed(store, "a")).crashes == 0


async def test_a_claim_whose_round_trip_broke_is_given_back_with_the_next(store: SharedStore, keeper: Keeper) -> None:
    keeper.fails = "after"
    for _ in range(2):
        with pytest.raises(StoreError):
            await store.claim("a", LEASE)
    keeper.fails = None

    assert (await claimed(store, "a")).crashes == 0


async def test_the_second_who_wanted_a_key_gets_it_where_the_first_has_gone(store: SharedStore, keeper: Keeper) -> None:
    keeper.goes_on.clear()
    first, second = [asyncio.create_task(store.claim("a", LEASE)) for _ in range(2)]
    await until(lambda: keeper.turns)
    first.cancel()
    await asyncio.wait((first,))

    keeper.goes_on.set()

    assert isinstance(await second, Mine)


# ── a keeper that does not answer ───────────────────────────────────────────────────────────────────────────────────


async def test_everybody_in_a_round_trip_that_breaks_is_told(store: SharedStore, keeper: Keeper) -> None:
    mine = await claimed(store, "a")
    keeper.fails = "before"

    told = await asyncio.gather(
        store.claim("b", LEASE), store.claim("b", LEASE), store.complete("a", mine.token, KEEP_DONE),
        return_exceptions=True,
    )  # fmt: skip

    assert [str(error) for error in told] == ["nowhere://: OSError"] * 3
    assert {type(error) for error in told} == {StoreError}


async def test_a_keeper_that_is_silent_for_too_long_is_down_for_those_who_wait_behind_as_well(
    store: SharedStore, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventbus.idempotency.base.ANSWER_TIMEOUT_S", 0.05)
    keeper.goes_on.clear()
    first = asyncio.create_task(store.claim("a", LEASE))
    await until(lambda: keeper.turns)
    second = asyncio.create_task(store.claim("b", LEASE))

    told = await asyncio.gather(first, second, return_exceptions=True)

    assert [str(error) for error in told] == ["nowhere:// did not answer within 0.05 s"] * 2
    assert len(keeper.turns) == 1


async def test_it_goes_on_when_the_keeper_is_back(store: SharedStore, keeper: Keeper) -> None:
    mine = await claimed(store, "a")
    keeper.fails = "before"
    with pytest.raises(StoreError):
        await store.complete("a", mine.token, KEEP_DONE)
    keeper.fails = None

    assert await store.complete("a", mine.token, KEEP_DONE)

    assert await store.claim("a", LEASE) == Done()


# ── opening and closing ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_store_that_is_not_open_says_so(keeper: Keeper) -> None:
    store = SharedStore(keeper)

    with pytest.raises(StoreError, match="is not open: use `async with store:`"):
        await store.claim("a", LEASE)
    async with store:
        mine = await claimed(store, "a")
    with pytest.raises(StoreError, match="is not open"):
        await store.complete("a", mine.token, KEEP_DONE)


async def test_closing_answers_what_was_asked_for(keeper: Keeper) -> None:
    async with SharedStore(keeper) as store:
        asked = asyncio.create_task(store.claim("a", LEASE))
        await asyncio.sleep(0)

    assert isinstance(await asked, Mine)
    assert keeper.is_closed


async def test_closing_gives_back_what_is_in_doubt(keeper: Keeper) -> None:
    async with SharedStore(keeper) as store:
        keeper.fails = "after"
        with pytest.raises(StoreError):
            await store.claim("a", LEASE)
        keeper.fails = None

    async with SharedStore(keeper) as store:
        assert (await claimed(store, "a")).crashes == 0


async def test_closing_does_not_wait_for_a_keeper_that_is_down(keeper: Keeper) -> None:
    async with SharedStore(keeper) as store:
        keeper.fails = "before"
        with pytest.raises(StoreError):
            await store.claim("a", LEASE)

    assert keeper.is_closed


async def test_a_keeper_that_cannot_be_opened_is_closed(keeper: Keeper) -> None:
    keeper.refuses = SetupError("no tables")

    with pytest.raises(SetupError, match="no tables"):
        await SharedStore(keeper).open()

    assert keeper.is_closed


async def test_a_keeper_that_is_silent_at_the_start_is_an_error(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventbus.idempotency.shared.OPEN_TIMEOUT_S", 0.05)
    keeper.goes_on.clear()

    with pytest.raises(StoreError, match=r"nowhere:// did not answer within 0\.05 s"):
        await SharedStore(keeper).open()

    assert keeper.is_closed


async def test_what_the_operator_should_know_is_logged_at_the_start(
    keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    keeper.remarks = ["it forgets"]

    async with SharedStore(keeper):
        pass

    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, "nowhere://: it forgets")]


# ── cleaning up ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_has_expired_is_removed_in_batches_until_there_is_no_more(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventbus.idempotency.shared.CLEAN_EVERY_S", 0.01)
    monkeypatch.setattr("eventbus.idempotency.shared.CLEAN_AT_ONCE", 10)
    monkeypatch.setattr("eventbus.idempotency.shared.CLEAN_PAUSE_S", 0.0)
    keeper.expired = 25

    async with SharedStore(keeper):
        await until(lambda: len(keeper.cleaned) >= 4)

    assert keeper.cleaned[:4] == [10, 10, 5, 0]


async def test_cleaning_that_fails_is_logged_and_tried_again(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("eventbus.idempotency.shared.CLEAN_EVERY_S", 0.01)
    keeper.fails = "before"

    async with SharedStore(keeper):
        await until(lambda: caplog.records)
        keeper.fails = None
        await until(lambda: keeper.cleaned)

    assert "expired keys could not be removed" in caplog.records[0].getMessage()
