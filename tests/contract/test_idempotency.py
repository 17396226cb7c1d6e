"""What every idempotency store promises: in memory, on SQLite, PostgreSQL and Redis."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventbus import SetupError
from eventbus.clock import VirtualClock
from eventbus.errors import StoreError
from eventbus.idempotency import IdempotencyStore, MemoryStore, SharedStore, from_url, shared_store
from eventbus.idempotency.base import KEEP_DONE, LEASE, Claim, Done, Mine, OnlyStoreErrors, Theirs
from tests import stores
from tests.conftest import SHARED_STORES

KEY, OTHER = "mail/welcome/user_registered/1", "mail/welcome/user_registered/2"
IN_PROCESS = ("memory", "memory, held to the port")
# What a busy computer may take between two lines of a test: time in a real store passes by itself, too.
SLACK = timedelta(seconds=8)
LetPass = Callable[[timedelta], Awaitable[None]]


@dataclass(frozen=True)
class Subject:
    """A store, and how to make time pass for it."""

    store: IdempotencyStore
    let_pass: LetPass


def in_process(name: str) -> Subject:
    clock = VirtualClock()
    store = MemoryStore(clock=clock)

    async def let_pass(by: timedelta) -> None:
        clock.set_to(clock.monotonic_s() + by.total_seconds())

    return Subject(store if name == "memory" else OnlyStoreErrors(store), let_pass)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Subject]:
    async with shared_store(url) as store:
        yield Subject(store, lambda by: stores.let_pass(url, by))


@pytest.fixture(params=[*IN_PROCESS, *SHARED_STORES])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """Each store, one after the other."""
    if request.param in IN_PROCESS:
        yield in_process(request.param)
        return
    url: str = request.getfixturevalue(f"{request.param}_url")
    await stores.make_tables(url)
    async with opened(url) as subject:
        yield subject


@pytest.fixture
def store(subject: Subject) -> IdempotencyStore:
    return subject.store


@pytest.fixture
def let_pass(subject: Subject) -> LetPass:
    return subject.let_pass


def is_theirs_for(claim: Claim, lease: timedelta) -> bool:
    """Whether *claim* is somebody else's for *lease*, less what the test itself took."""
    return isinstance(claim, Theirs) and lease - SLACK <= claim.lease_left <= lease


async def claimed(store: IdempotencyStore, key: str = KEY) -> Mine:
    claim = await store.claim(key, LEASE)
    assert isinstance(claim, Mine)
    return claim


async def test_a_key_that_nobody_claimed_is_mine(store: IdempotencyStore) -> None:
    claim = await claimed(store)

    assert claim.token
    assert claim.crashes == 0


async def test_a_claimed_key_is_theirs_for_the_rest_of_the_lease(store: IdempotencyStore, let_pass: LetPass) -> None:
    await claimed(store)
    await let_pass(timedelta(seconds=10))

    assert is_theirs_for(await store.claim(KEY, LEASE), LEASE - timedelta(seconds=10))


async def test_keys_are_independent(store: IdempotencyStore) -> None:
    mine = await claimed(store)

    other = await claimed(store, OTHER)

    assert other.token != mine.token


async def test_of_simultaneous_claims_exactly_one_is_mine(store: IdempotencyStore) -> None:
    claims = await asyncio.gather(*(store.claim(KEY, LEASE) for _ in range(50)))

    assert sum(isinstance(claim, Mine) for claim in claims) == 1
    assert sum(isinstance(claim, Theirs) for claim in claims) == 49


async def test_a_completed_key_is_done(store: IdempotencyStore) -> None:
    mine = await claimed(store)

    assert await store.complete(KEY, mine.token, KEEP_DONE)

    assert await store.claim(KEY, LEASE) == Done()


async def test_done_is_forgotten_after_the_time_given(store: IdempotencyStore, let_pass: LetPass) -> None:
    mine = await claimed(store)
    await store.complete(KEY, mine.token, KEEP_DONE)

    await let_pass(KEEP_DONE - SLACK)
    assert await store.claim(KEY, LEASE) == Done()
    await let_pass(SLACK)
    again = await claimed(store)

    assert again.crashes == 0


async def test_a_freed_key_is_as_if_it_had_never_been_claimed(store: IdempotencyStore) -> None:
    mine = await claimed(store)

    assert await store.free(KEY, mine.token)

    again = await claimed(store)
    assert again.crashes == 0
    assert again.token != mine.token


async def test_a_crash_frees_the_key_when_the_lease_ends_and_is_counted(
    store: IdempotencyStore, let_pass: LetPass
) -> None:
    for crashes in range(4):
        claim = await claimed(store)
        assert claim.crashes == crashes
        await let_pass(LEASE)


async def test_crashes_are_forgotten_with_an_orderly_end(store: IdempotencyStore, let_pass: LetPass) -> None:
    await claimed(store)
    await let_pass(LEASE)
    second = await claimed(store)
    await store.free(KEY, second.token)

    assert (await claimed(store)).crashes == 0


async def test_renewing_begins_the_lease_anew(store: IdempotencyStore, let_pass: LetPass) -> None:
    mine = await claimed(store)

    for _ in range(5):
        await let_pass(LEASE - timedelta(seconds=1))
        assert await store.renew(KEY, mine.token, LEASE)
        assert is_theirs_for(await store.claim(KEY, LEASE), LEASE)


async def test_a_claim_that_was_late_but_not_taken_over_can_still_be_renewed_and_completed(
    store: IdempotencyStore, let_pass: LetPass
) -> None:
    mine = await claimed(store)
    await let_pass(2 * LEASE)

    assert await store.renew(KEY, mine.token, LEASE)
    await let_pass(2 * LEASE)
    assert await store.complete(KEY, mine.token, KEEP_DONE)

    assert await store.claim(KEY, LEASE) == Done()


@pytest.mark.parametrize("method", ["renew", "complete", "free"])
async def test_whoever_was_taken_over_changes_nothing_any_more(
    store: IdempotencyStore, let_pass: LetPass, method: str
) -> None:
    stalled = await claimed(store)
    await let_pass(LEASE)
    mine = await claimed(store)

    assert not await call(store, method, KEY, stalled.token)

    assert is_theirs_for(await store.claim(KEY, LEASE), LEASE)
    assert await store.complete(KEY, mine.token, KEEP_DONE)


@pytest.mark.parametrize("method", ["renew", "complete", "free"])
async def test_a_token_is_good_for_its_own_key_only(store: IdempotencyStore, method: str) -> None:
    mine = await claimed(store)
    await claimed(store, OTHER)

    assert not await call(store, method, OTHER, mine.token)
    assert not await call(store, method, "never claimed", mine.token)


@pytest.mark.parametrize("method", ["renew", "complete", "free"])
@pytest.mark.parametrize("ended_by", ["complete", "free"])
async def test_a_claim_that_has_ended_cannot_be_used_again(store: IdempotencyStore, ended_by: str, method: str) -> None:
    mine = await claimed(store)
    await call(store, ended_by, KEY, mine.token)

    assert not await call(store, method, KEY, mine.token)

    assert isinstance(await store.claim(KEY, LEASE), Done if ended_by == "complete" else Mine)


async def call(store: IdempotencyStore, method: str, key: str, token: str) -> bool:
    match method:
        case "renew":
            return await store.renew(key, token, LEASE)
        case "complete":
            return await store.complete(key, token, KEEP_DONE)
        case _:
            return await store.free(key, token)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "renew", "complete", "free", "wait"]),
        st.integers(0, 2),  # a worker
        st.integers(0, 1),  # a key
        # Seconds. Far enough from a lease's end, if not at it: in a real store time passes by itself, too.
        st.sampled_from([0, 10, 20, 30, 40]),
    ),
    max_size=40,
)


@pytest.mark.parametrize("name", IN_PROCESS)
@settings(max_examples=200)
@given(STEPS)
def test_a_key_has_one_owner_at_a_time_whatever_happens(name: str, steps: list[tuple[str, int, int, int]]) -> None:
    asyncio.run(play(in_process(name), steps))


# One store for all examples: each has keys of its own.
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_a_shared_key_has_one_owner_at_a_time_whatever_happens(
    shared_store_url: str, steps: list[tuple[str, int, int, int]]
) -> None:
    async def example() -> None:
        async with opened(shared_store_url) as subject:
            await play(subject, steps)

    asyncio.run(example())


async def play(subject: Subject, steps: list[tuple[str, int, int, int]]) -> None:
    """Plays *steps* against the store and against what the port says, in ten lines."""
    store, prefix, now_s = subject.store, secrets.token_hex(4), 0
    owner: dict[str, tuple[str, float]] = {}  # key -> token and when its lease ends
    tokens: dict[tuple[int, str], str] = {}
    done: set[str] = set()
    for what, worker, number, seconds in steps:
        key = f"{prefix} {number}"
        token = tokens.get((worker, key), "none")
        is_owner = key in owner and owner[key][0] == token
        if what == "wait":
            await subject.let_pass(timedelta(seconds=seconds))
            now_s += seconds
        elif what == "claim":
            claim: Claim = await store.claim(key, LEASE)
            is_free = key not in owner or owner[key][1] <= now_s
            assert isinstance(claim, Done if key in done else Mine if is_free else Theirs)
            if isinstance(claim, Mine):
                owner[key] = claim.token, now_s + LEASE.total_seconds()
                tokens[worker, key] = claim.token
        else:
            assert await call(store, what, key, token) == is_owner
            if is_owner and what == "renew":
                owner[key] = token, now_s + LEASE.total_seconds()
            elif is_owner:
                del owner[key]
                done |= {key} if what == "complete" else set()


# ── the memory store's own promises ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


async def test_the_memory_store_is_bounded_and_forgets_the_oldest_first(clock: VirtualClock) -> None:
    store = MemoryStore(max_keys=10, clock=clock)
    for number in range(25):
        mine = await claimed(store, f"key {number}")
        await store.complete(f"key {number}", mine.token, KEEP_DONE)

    known = 0  # from the newest on: asking for one that is forgotten makes room for it
    while isinstance(await store.claim(f"key {24 - known}", LEASE), Done):
        known += 1

    assert 5 <= known <= 10


async def test_a_full_memory_store_never_drops_a_live_claim(clock: VirtualClock) -> None:
    store = MemoryStore(max_keys=3, clock=clock)
    claims = [await claimed(store, f"key {number}") for number in range(3)]

    with pytest.raises(StoreError, match="3 keys are claimed at once; raise max_keys"):
        await store.claim("one more", LEASE)

    assert all([await store.renew(f"key {n}", claim.token, LEASE) for n, claim in enumerate(claims)])


async def test_a_full_memory_store_makes_room_of_claims_whose_workers_crashed(clock: VirtualClock) -> None:
    store = MemoryStore(max_keys=3, clock=clock)
    for number in range(3):
        await claimed(store, f"key {number}")
    clock.set_to(LEASE.total_seconds())

    await claimed(store, "one more")


def test_a_store_is_found_by_its_url_and_an_unknown_one_is_refused_without_its_password() -> None:
    assert isinstance(from_url("memory://"), MemoryStore)
    assert isinstance(from_url("sqlite:///shop.db"), SharedStore)

    with pytest.raises(SetupError, match="no idempotency store for") as raised:
        from_url("mysql://user:hunter2@host/")
    assert "hunter2" not in str(raised.value)


# ── a store of anybody's, held to the port ──────────────────────────────────────────────────────────────────────────


class Broken(MemoryStore):
    """A store whose driver raises what it likes, with the key in its text."""

    async def claim(self, key: str, lease: timedelta) -> Claim:
        raise OSError(f"cannot write {key}")


class Silent(MemoryStore):
    async def claim(self, key: str, lease: timedelta) -> Claim:
        await asyncio.Event().wait()
        raise AssertionError


async def test_whatever_a_store_raises_is_a_store_error_that_does_not_quote_the_key() -> None:
    with pytest.raises(StoreError, match=r"^Broken raised OSError$"):
        await OnlyStoreErrors(Broken()).claim("ada@example.com", LEASE)


async def test_a_store_that_is_silent_for_too_long_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventbus.idempotency.base.ANSWER_TIMEOUT_S", 0.01)

    with pytest.raises(StoreError, match=r"^Silent raised TimeoutError$"):
        await OnlyStoreErrors(Silent()).claim(KEY, LEASE)
