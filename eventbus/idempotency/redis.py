"""Idempotency keys in Redis (or Valkey): one script, all or nothing, on the server's clock.

A key is a string with an expiry of its own, so that nothing has to clean up:

    eventbus:<digest>    "<lease ends, ms> <crashes> <token>"    claimed; outlives its lease, so that a crash is told of
                         "done"

Redis is one server here, with or without replicas. What it forgets is done again: it must keep what it is given
(`maxmemory-policy noeviction`) and survive a restart (`appendonly yes`), and a failover to a replica that lags may
forget the last claims and completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any  # Any: what Redis answers

from eventbus.errors import SetupError, StoreError, hide_password
from eventbus.idempotency.base import KEEP_DONE, Claim, Done, Mine, Theirs
from eventbus.idempotency.shared import Change, Wish

try:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import (
        AuthenticationError,
        AuthorizationError,
        NoPermissionError,
        NoScriptError,
        RedisError,
    )
except ModuleNotFoundError as error:
    raise SetupError(f"redis:// needs {error.name}: pip install 'eventbus[redis]'") from error

PREFIX = "eventbus:"
CONNECT_TIMEOUT_S = 5.0
_DONE = Done()

# KEYS: those to change, then those to claim. ARGV: the token; for each key to change "held|done MS TOKEN"; for each to
# claim "MS", all in a line each. Answers for each key: 1 or 0; "mine CRASHES", "theirs MS-LEFT" or "done".
_SCRIPT = f"""
local keep_crashed = {KEEP_DONE // timedelta(milliseconds=1)}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local token, answers, n = ARGV[1], {{}}, 0

local function held(ms, crashes, whose)
    return string.format('%.0f %d %s', now + ms, crashes, whose), string.format('%.0f', ms + keep_crashed)
end

for what, ms, whose in string.gmatch(ARGV[2], '(%a+) (%d+) (%S+)') do
    n = n + 1
    local value = redis.call('GET', KEYS[n]) or ''
    if string.sub(value, -1 - #whose) ~= ' ' .. whose then
        answers[n] = '0'
    else
        answers[n] = '1'
        if what == 'held' then
            local renewed, keep = held(ms, string.match(value, ' (%d+) '), whose)
            redis.call('SET', KEYS[n], renewed, 'PX', keep)
        elseif ms == '0' then
            redis.call('DEL', KEYS[n])
        else
            redis.call('SET', KEYS[n], 'done', 'PX', ms)
        end
    end
end

local lease, value, keep  -- mostly the same for all
for ms in string.gmatch(ARGV[3], '%d+') do
    n = n + 1
    if ms ~= lease then
        lease, value, keep = ms, held(ms, 0, token)
    end
    if redis.call('SET', KEYS[n], value, 'PX', keep, 'NX') then
        answers[n] = 'mine 0'
    else
        local ends, crashes = string.match(redis.call('GET', KEYS[n]), '^(%d+) (%d+) ')
        if not ends then
            answers[n] = 'done'
        elseif ends - now > 0 then
            answers[n] = string.format('theirs %.0f', ends - now)
        else
            local again, keep_again = held(ms, crashes + 1, token)
            redis.call('SET', KEYS[n], again, 'PX', keep_again)
            answers[n] = string.format('mine %d', crashes + 1)
        end
    end
end
return table.concat(answers, ',')
"""


class RedisKeeper:
    """Keys in Redis, over one connection of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._redis: Redis = Redis.from_url(
                url,
                single_connection_client=True,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=None,  # whoever asked has a deadline
                # Whoever asked decides: the first try may have been carried out.
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise SetupError(f"{self.where!r} is no URL of a Redis: {error}") from None
        self._script = ""

    @property
    def where(self) -> str:
        return hide_password(self._url)

    async def open(self) -> Sequence[str]:
        try:
            server = await self._redis.info()
            self._script = await self._redis.script_load(_SCRIPT)
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise SetupError(
                f"{self.where}: {error}; the commands are INFO, SCRIPT LOAD, EVALSHA, GET, SET, DEL, TIME"
            ) from error
        except (RedisError, OSError) as error:
            raise self._error(error) from error
        return _remarks(self.where, server)

    async def turn(
        self, token: str, wishes: Sequence[Wish], changes: Sequence[Change]
    ) -> tuple[dict[str, Claim], set[str]]:
        keys = [change.key for change in changes]
        keys += [key for key, _ in wishes]
        to_change = "\n".join(f"{'held' if is_held else 'done'} {ms} {whose}" for _, whose, ms, is_held in changes)
        to_claim = "\n".join(str(lease_ms) for _, lease_ms in wishes)
        try:
            answered = await self._run(len(keys), *_names(keys), token, to_change, to_claim)
        except (RedisError, OSError) as error:
            raise self._error(error) from error
        answers = answered.decode().split(",")
        mine = Mine(token)
        claims = {
            wish.key: mine if answer == "mine 0" else _claim(token, answer)
            for wish, answer in zip(wishes, answers[len(changes) :], strict=True)
        }
        return claims, {change.key for change, answer in zip(changes, answers, strict=False) if answer == "1"}

    async def _run(self, *arguments: str | int | bytes) -> bytes:
        try:
            answered: bytes = await self._execute("EVALSHA", self._script, *arguments)
        except NoScriptError:  # it has been restarted; this loads it as well
            answered = await self._execute("EVAL", _SCRIPT, *arguments)
        return answered

    async def _execute(self, *command: str | int | bytes) -> bytes:
        return await self._redis.execute_command(*command)  # type: ignore[no-any-return,no-untyped-call]  # not typed

    async def clean(self, at_most: int) -> int:
        return 0  # each key has its expiry

    async def close(self) -> None:
        await self._redis.aclose()

    def _error(self, error: Exception) -> StoreError:
        return StoreError(f"{self.where} did not do it: {type(error).__name__}: {error}")


def _names(keys: Sequence[str]) -> list[bytes]:
    """What *keys* are called in Redis. All at once: the client takes bytes as they are, and text one by one."""
    return f"{PREFIX}{f' {PREFIX}'.join(keys)}".encode().split()


def _claim(token: str, answer: str) -> Claim:
    what, _, number = answer.partition(" ")
    if what == "mine":
        return Mine(token, int(number))
    return _DONE if what == "done" else Theirs(timedelta(milliseconds=int(number)))


def _remarks(where: str, server: Mapping[str, Any]) -> list[str]:
    """What an operator should know of a *server* that can be used.

    Raises:
        SetupError: it cannot.
    """
    if server.get("cluster_enabled"):
        raise SetupError(f"{where} is a Redis Cluster, which keeps the keys of one turn apart: give a single server")
    if server.get("role") == "slave":
        raise SetupError(f"{where} is a replica, which takes no claims: give its primary")
    remarks = []
    policy = server.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        remarks.append(
            f"maxmemory-policy is {policy}: when memory runs out it forgets what has been handled, and that is handled "
            "again; set maxmemory-policy noeviction"
        )
    return remarks
