"""What shared stores promise beyond the port, on real servers: whose clock, what is cleaned, what a break leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import asyncpg
import pytest
from redis.asyncio import Redis
from sqlalchemy import func, select, text

from eventbus.database import KEYS, open_engine
from eventbus.errors import SetupError, StoreError
from eventbus.idempotency import Keeper, SharedStore, keeper_of, shared_store
from eventbus.idempotency.base import KEEP_DONE, LEASE, Claim, Done, Mine, Theirs, digest
from tests.stores import StoreServer, let_pass, make_tables

SECOND = timedelta(seconds=1)


async def claimed(store: SharedStore, key: str, lease: timedelta = LEASE) -> Mine:
    claim = await store.claim(key, lease)
    assert isinstance(claim, Mine)
    return claim


async def crashed(store: SharedStore, key: str) -> Mine:
    """Claimed again, once the lease of another's claim has ended by itself."""
    async with asyncio.timeout(60):
        while not isinstance(claim := await store.claim(key, LEASE), Mine):  # noqa: ASYNC110  # the store tells nobody
            await asyncio.sleep(0.02)
    return claim


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_lease_ends_by_the_clock_of_the_store(shared_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)  # a worker whose clock is wrong by decades
    async with shared_store(shared_store_url) as store:
        await store.claim("a", SECOND)
        theirs = await store.claim("a", LEASE)

        assert isinstance(theirs, Theirs)
        assert timedelta(0) < theirs.lease_left <= SECOND
        assert (await crashed(store, "a")).crashes == 1


async def test_done_is_forgotten_by_the_clock_of_the_store(shared_store_url: str) -> None:
    async with shared_store(shared_store_url) as store:
        mine = await claimed(store, "a")
        await store.complete("a", mine.token, SECOND)

        assert await store.claim("a", LEASE) == Done()
        assert (await crashed(store, "a")).crashes == 0


# ── a connection that was lost in the middle of a statement ─────────────────────────────────────────────────────────


async def test_a_statement_that_was_cancelled_leaves_no_lock_on_a_sqlite_file(sqlite_url: str) -> None:
    await make_tables(sqlite_url)
    engine, other = open_engine(sqlite_url), open_engine(sqlite_url)
    async with shared_store(sqlite_url) as store:
        await claimed(store, "a")
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.execute("BEGIN IMMEDIATE")
        # As a cancelled task's traceback holds it: with rows that nobody has read.
        held = await driver.execute("UPDATE eventbus_keys SET token = token RETURNING key")
        await connection.invalidate()

        async with other.connect() as another:
            await another.execute(text("DELETE FROM eventbus_keys"))
            await another.commit()
        del held

    await engine.dispose()
    await other.dispose()


# ── cleaning up ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def rows(url: str) -> int:
    engine = open_engine(url)
    try:
        async with engine.connect() as connection:
            return int(await connection.scalar(select(func.count()).select_from(KEYS)) or 0)
    finally:
        await engine.dispose()


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_what_is_kept_no_longer_is_removed_in_bounded_batches(name: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{name}_url")
    await make_tables(url)
    keeper = keeper_of(url)
    async with SharedStore(keeper) as store:
        mine = await asyncio.gather(*(claimed(store, f"done {n}") for n in range(30)))
        await asyncio.gather(*(store.complete(f"done {n}", m.token, KEEP_DONE) for n, m in enumerate(mine)))
        freed = await claimed(store, "freed")
        await store.free("freed", freed.token)
        await claimed(store, "crashed")
        await let_pass(url, KEEP_DONE)
        fresh = await claimed(store, "fresh")
        await store.complete("fresh", fresh.token, KEEP_DONE)
        await claimed(store, "claimed")

        assert [await keeper.clean(at_most=20) for _ in range(3)] == [20, 11, 0]

        assert await rows(url) == 3
        assert (await claimed(store, "crashed")).crashes == 1  # a crash of a week ago is one still
        assert await store.claim("fresh", LEASE) == Done()
        assert isinstance(await store.claim("claimed", LEASE), Theirs)
        await let_pass(url, 2 * KEEP_DONE)
        assert await keeper.clean(at_most=20) == 3
        assert await rows(url) == 0


async def test_redis_itself_forgets_what_is_kept_no_longer(redis_url: str) -> None:
    async with shared_store(redis_url) as store, Redis.from_url(redis_url) as redis:
        done, freed, _ = [await claimed(store, key) for key in ("done", "freed", "crashed")]
        await store.complete("done", done.token, timedelta(days=1))
        await store.free("freed", freed.token)

        left_s = {key: await redis.ttl(f"eventbus:{digest(key)}") for key in ("done", "freed", "crashed")}

    assert 86_000 < left_s["done"] <= 86_400
    assert left_s["freed"] == -2  # no such key
    week_s = (KEEP_DONE + LEASE).total_seconds()
    assert week_s - 400 < left_s["crashed"] <= week_s  # a crash is told of for as long as a success


# ── breaks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["postgresql", "redis"])
async def test_what_was_done_survives_a_crash_of_the_server_and_the_store_connects_again_by_itself(
    name: str, own_store: Callable[[str], StoreServer]
) -> None:
    server = await asyncio.to_thread(own_store, name)
    url = await asyncio.to_thread(server.new_url)
    await make_tables(url)
    async with shared_store(url) as store:
        done, held = await claimed(store, "done"), await claimed(store, "held")
        await store.complete("done", done.token, KEEP_DONE)
        await asyncio.to_thread(server.kill)
        with pytest.raises(StoreError):
            await store.claim("another", LEASE)
        await asyncio.to_thread(server.start)

        assert await store.claim("done", LEASE) == Done()
        assert isinstance(await store.claim("held", LEASE), Theirs)
        assert await store.complete("held", held.token, KEEP_DONE)
        assert (await claimed(store, "another")).crashes == 0  # in doubt, and given back


async def test_a_session_that_postgresql_ends_is_one_error_at_most(postgresql_url: str) -> None:
    await make_tables(postgresql_url)
    async with shared_store(postgresql_url) as store:
        mine = await claimed(store, "a")
        other = await asyncpg.connect(postgresql_url)
        await other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                            " AND datname = current_database()")  # fmt: skip
        await other.close()

        with suppress(StoreError):  # unless the end was noticed before
            await store.claim("b", LEASE)
        assert await store.complete("a", mine.token, KEEP_DONE)


async def test_a_deadlock_with_somebody_else_is_tried_again(postgresql_url: str) -> None:
    await make_tables(postgresql_url)
    first, second = sorted(("a", "b"), key=digest)
    async with shared_store(postgresql_url) as store:
        mine = {key: await claimed(store, key) for key in (first, second)}
        somebody = await asyncpg.connect(postgresql_url)
        lock = "SELECT 1 FROM eventbus_keys WHERE key = $1 FOR UPDATE"
        # Locked against the order in which the store locks: it holds the first, and waits for the second.
        async with somebody.transaction():
            # Whoever has waited for longer is the one that is told: it is the store that looks for the deadlock first.
            await somebody.execute("SET LOCAL deadlock_timeout = '60s'")
            await somebody.fetch(lock, digest(second))
            changing = asyncio.gather(*(store.complete(key, mine[key].token, KEEP_DONE) for key in (first, second)))
            await until_it_waits(postgresql_url)
            await somebody.fetch(lock, digest(first))
        await somebody.close()

        assert await changing == [True, True]


async def until_it_waits(url: str) -> None:
    """Until a session at *url* waits for a lock."""
    looking = await asyncpg.connect(url)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(30):
        while not await looking.fetchval(waiting):  # noqa: ASYNC110  # the server tells nobody
            await asyncio.sleep(0.01)
    await looking.close()


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "redis"])
async def test_whoever_asks_at_the_same_time_from_another_connection_waits_or_is_told_whose_it_is(
    name: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(f"{name}_url")
    await make_tables(url)
    keys = [f"key {number}" for number in range(50)]
    async with shared_store(url) as one, shared_store(url) as other:
        for _ in range(10):
            claims = await asyncio.gather(*(store.claim(key, LEASE) for key in keys for store in (one, other)))
            won = [claim for claim in claims if isinstance(claim, Mine)]
            assert len(won) == len(keys)  # each by one of the two
            await asyncio.gather(*(give_back(store, keys, claims, n) for n, store in enumerate((one, other))))


async def give_back(store: SharedStore, keys: list[str], claims: list[Claim], which: int) -> None:
    mine = [(key, claim) for key, claim in zip(keys, claims[which::2], strict=True) if isinstance(claim, Mine)]
    assert all(await asyncio.gather(*(store.free(key, claim.token) for key, claim in mine)))


async def test_a_redis_that_has_lost_the_script_gets_it_again(redis_url: str) -> None:
    async with shared_store(redis_url) as store, Redis.from_url(redis_url) as redis:
        mine = await claimed(store, "a")
        await redis.script_flush()

        assert await store.complete("a", mine.token, KEEP_DONE)


# ── a Redis that will not do ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def own_redis_url(own_store: Callable[[str], StoreServer]) -> str:
    """The URL of a Redis whose configuration may be changed; it ends after the test."""
    server = await asyncio.to_thread(own_store, "redis")
    return await asyncio.to_thread(server.new_url)


async def test_a_redis_that_evicts_is_warned_of_at_the_start(
    own_redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Redis.from_url(own_redis_url) as redis:
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        try:
            async with shared_store(own_redis_url):
                pass
        finally:
            await redis.config_set("maxmemory-policy", "noeviction")

    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "maxmemory-policy is allkeys-lru: when memory runs out it forgets" in caplog.text


async def test_a_redis_that_keeps_what_it_is_given_is_not_warned_of(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with shared_store(redis_url):
        pass

    assert caplog.records == []


async def test_a_redis_without_memory_claims_nothing(own_redis_url: str) -> None:
    async with shared_store(own_redis_url) as store, Redis.from_url(own_redis_url) as redis:
        await redis.config_set("maxmemory", "1kb")
        try:
            with pytest.raises(StoreError, match="OutOfMemoryError"):
                await asyncio.gather(*(store.claim(str(number), LEASE) for number in range(10)))
        finally:
            await redis.config_set("maxmemory", "0")

        assert await redis.dbsize() == 0


async def test_a_replica_is_refused(own_redis_url: str) -> None:
    async with Redis.from_url(own_redis_url) as redis:
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]
        try:
            with pytest.raises(SetupError, match="is a replica, which takes no claims: give its primary"):
                await keeper_opened(keeper_of(own_redis_url))
        finally:
            await redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]


async def test_a_redis_that_turns_into_a_replica_claims_nothing(own_redis_url: str) -> None:
    async with shared_store(own_redis_url) as store, Redis.from_url(own_redis_url) as redis:
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]
        try:
            with pytest.raises(StoreError, match="read only replica"):
                await store.claim("a", LEASE)
        finally:
            await redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]

        await claimed(store, "a")


async def test_a_user_of_redis_who_may_not_is_told_what_it_takes(own_redis_url: str) -> None:
    async with Redis.from_url(own_redis_url) as redis:
        await redis.acl_setuser("reader", enabled=True, passwords="+secret", keys="*", commands=["+get", "+info"])
        try:
            with pytest.raises(SetupError, match="the commands are INFO, SCRIPT LOAD, ") as raised:
                await keeper_opened(keeper_of(own_redis_url.replace("://", "://reader:secret@")))
        finally:
            await redis.acl_deluser("reader")

    assert "secret" not in str(raised.value)


async def keeper_opened(keeper: Keeper) -> None:
    try:
        await keeper.open()
    finally:
        await keeper.close()
