"""What every idempotency store promises. A store joins by a fixture of its own in `STORES`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventbus.clock import VirtualClock
from eventbus.errors import StoreError
from eventbus.idempotency import IdempotencyStore, MemoryStore, from_url
from eventbus.idempotency.base import KEEP_DONE, LEASE, Claim, Done, Mine, OnlyStoreErrors, Theirs

# Each builds a store that asks the given clock.
STORES: dict[str, Callable[[VirtualClock], IdempotencyStore]] = {
    "memory": lambda clock: MemoryStore(clock=clock),
    "memory, held to the port": lambda clock: OnlyStoreErrors(MemoryStore(clock=clock)),
}
KEY, OTHER = "mail/welcome/user_registered/1", "mail/welcome/user_registered/2"


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, clock: VirtualClock) -> IdempotencyStore:
    return STORES[request.param](clock)


def let_pass(clock: VirtualClock, by: timedelta) -> None:
    clock.set_to(clock.monotonic_s() + by.total_seconds())


async def claimed(store: IdempotencyStore, key: str = KEY) -> Mine:
    claim = await store.claim(key, LEASE)
    assert isinstance(claim, Mine)
    return claim


async def test_a_key_that_nobody_claimed_is_mine(store: IdempotencyStore) -> None:
    claim = await claimed(store)

    assert claim.token
    assert claim.crashes == 0


async def test_a_claimed_key_is_theirs_for_the_rest_of_the_lease(store: IdempotencyStore, clock: VirtualClock) -> None:
    await claimed(store)
    let_pass(clock, timedelta(seconds=10))

    assert await store.claim(KEY, LEASE) == Theirs(LEASE - timedelta(seconds=10))


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


async def test_done_is_forgotten_after_the_time_given(store: IdempotencyStore, clock: VirtualClock) -> None:
    mine = await claimed(store)
    await store.complete(KEY, mine.token, KEEP_DONE)

    let_pass(clock, KEEP_DONE - timedelta(seconds=1))
    assert await store.claim(KEY, LEASE) == Done()
    let_pass(clock, timedelta(seconds=1))
    again = await claimed(store)

    assert again.crashes == 0


async def test_a_freed_key_is_as_if_it_had_never_been_claimed(store: IdempotencyStore) -> None:
    mine = await claimed(store)

    assert await store.free(KEY, mine.token)

    again = await claimed(store)
    assert again.crashes == 0
    assert again.token != mine.token


async def test_a_crash_frees_the_key_when_the_lease_ends_and_is_counted(
    store: IdempotencyStore, clock: VirtualClock
) -> None:
    for crashes in range(4):
        claim = await claimed(store)
        assert claim.crashes == crashes
        let_pass(clock, LEASE)


async def test_crashes_are_forgotten_with_an_orderly_end(store: IdempotencyStore, clock: VirtualClock) -> None:
    await claimed(store)
    let_pass(clock, LEASE)
    second = await claimed(store)
    await store.free(KEY, second.token)

    assert (await claimed(store)).crashes == 0


async def test_renewing_begins_the_lease_anew(store: IdempotencyStore, clock: VirtualClock) -> None:
    mine = await claimed(store)

    for _ in range(5):
        let_pass(clock, LEASE - timedelta(seconds=1))
        assert await store.renew(KEY, mine.token, LEASE)
        assert await store.claim(KEY, LEASE) == Theirs(LEASE)


async def test_a_claim_that_was_late_but_not_taken_over_can_still_be_renewed_and_completed(
    store: IdempotencyStore, clock: VirtualClock
) -> None:
    mine = await claimed(store)
    let_pass(clock, 2 * LEASE)

    assert await store.renew(KEY, mine.token, LEASE)
    let_pass(clock, 2 * LEASE)
    assert await store.complete(KEY, mine.token, KEEP_DONE)

    assert await store.claim(KEY, LEASE) == Done()


@pytest.mark.parametrize("method", ["renew", "complete", "free"])
async def test_whoever_was_taken_over_changes_nothing_any_more(
    store: IdempotencyStore, clock: VirtualClock, method: str
) -> None:
    stalled = await claimed(store)
    let_pass(clock, LEASE)
    mine = await claimed(store)

    assert not await call(store, method, KEY, stalled.token)

    assert await store.claim(KEY, LEASE) == Theirs(LEASE)
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
        st.integers(0, 40),  # seconds
    ),
    max_size=40,
)


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
@settings(max_examples=200)
@given(STEPS)
def test_a_key_has_one_owner_at_a_time_whatever_happens(
    make: Callable[[VirtualClock], IdempotencyStore], steps: list[tuple[str, int, int, int]]
) -> None:
    asyncio.run(play(make, steps))


async def play(make: Callable[[VirtualClock], IdempotencyStore], steps: list[tuple[str, int, int, int]]) -> None:
    """Plays *steps* against the store and against what the port says, in ten lines."""
    clock = VirtualClock()
    store = make(clock)
    owner: dict[str, tuple[str, float]] = {}  # key -> token and when its lease ends
    tokens: dict[tuple[int, str], str] = {}
    done: set[str] = set()
    for what, worker, number, seconds in steps:
        key = f"key {number}"
        token = tokens.get((worker, key), "none")
        is_owner = key in owner and owner[key][0] == token
        if what == "wait":
            let_pass(clock, timedelta(seconds=seconds))
        elif what == "claim":
            claim: Claim = await store.claim(key, LEASE)
            is_free = key not in owner or owner[key][1] <= clock.monotonic_s()
            assert isinstance(claim, Done if key in done else Mine if is_free else Theirs)
            if isinstance(claim, Mine):
                owner[key] = claim.token, clock.monotonic_s() + LEASE.total_seconds()
                tokens[worker, key] = claim.token
        else:
            assert await call(store, what, key, token) == is_owner
            if is_owner and what == "renew":
                owner[key] = token, clock.monotonic_s() + LEASE.total_seconds()
            elif is_owner:
                del owner[key]
                done |= {key} if what == "complete" else set()


# ── the memory store's own promises ─────────────────────────────────────────────────────────────────────────────────


async def test_the_memory_store_is_bounded_and_forgets_the_oldest_first(clock: VirtualClock) -> None:
    store = MemoryStore(max_keys=10, clock=clock)
    for number in range(25):
        mine = await claimed(store, f"key {number}")
        await store.complete(f"key {number}", mine.token, KEEP_DONE)

    known = 0  # from the newest on: asking for one that is forgotten makes room for it
    while isinstance(await store.claim(f"key {24 - known}", LEASE), Done):
        known += 1

    assert 9 <= known <= 10


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
    let_pass(clock, LEASE)

    await claimed(store, "one more")


def test_a_store_is_found_by_its_url_and_an_unknown_one_is_refused_without_its_password() -> None:
    assert isinstance(from_url("memory://"), MemoryStore)

    with pytest.raises(Exception, match="no idempotency store for") as raised:
        from_url("redis://user:hunter2@host/")
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
