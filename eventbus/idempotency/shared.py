"""An idempotency store that workers share: what its callers ask for in one turn of the event loop is one round trip.

The rule here: whoever cannot be told that a claim is theirs does not keep it. A claim whose caller has gone, or whose
round trip ended without an answer, is given back with the next one. Where keys are kept, and what time it is there, is
the keeper's business (`sql.py`, `redis.py`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Callable, Container, Coroutine, Iterable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import (
    Any,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
)  # Any: what a coroutine is sent, which nobody does; any future

from eventbus.errors import StoreError
from eventbus.idempotency import base
from eventbus.idempotency.base import Claim, Mine, Theirs, digest

log = logging.getLogger("eventbus.idempotency")

T = TypeVar("T")

OPEN_TIMEOUT_S = 10.0
# Short against the lease of a claim, long against the work of looking.
CLEAN_EVERY_S = 30.0
CLEAN_AT_ONCE = 1_000
CLEAN_PAUSE_S = 0.05  # between two batches, so that claims come in between
# More claims than that without an answer, and the rest ends with its lease.
MOST_IN_DOUBT = 10_000


class Wish(NamedTuple):
    """A key that somebody wants to claim."""

    key: str
    lease_ms: int


class Change(NamedTuple):
    """What becomes of a key, if the claim is still the token's.

    It is kept by the token for *ms* more if *is_held*; else it is done, and remembered for *ms*: none gives it back.
    """

    key: str
    token: str
    ms: int
    is_held: bool


class Keeper(Protocol):
    """Where keys are kept. It is asked one thing at a time; what it raises ends the round trip, and nothing more.

    No key is wanted twice in one turn, nor changed twice.
    """

    @property
    def where(self) -> str:
        """Its URL, without a password."""

    async def open(self) -> Sequence[str]:
        """Connect, and see that all is as it must be. Gives what the operator should know besides, a line each.

        Raises:
            SetupError: it cannot work like this; says what to do.
            StoreError: nobody answered.
        """

    async def turn(
        self, token: str, wishes: Sequence[Wish], changes: Sequence[Change]
    ) -> tuple[Mapping[str, Claim], Container[str]]:
        """Make *changes*, then claim for *token* what is free. Gives the claims by key, and the keys changed."""

    async def clean(self, at_most: int) -> int:
        """Remove what is kept no longer, and tell how many."""

    async def close(self) -> None:
        """Let go of it. Harmless where it is not open."""


class SharedStore:
    """The port over a keeper. Open it before its first use, and close it: `async with store:` does both."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._name = secrets.token_hex(8)
        self._turns = 0
        self._wishes: dict[str, tuple[int, list[asyncio.Future[Claim]]]] = {}
        self._changes: dict[str, tuple[Change, asyncio.Future[bool]]] = {}
        self._later: list[tuple[Change, asyncio.Future[bool]]] = []
        self._in_doubt: deque[Change] = deque(maxlen=MOST_IN_DOUBT)
        self._one_at_a_time = asyncio.Lock()
        self._sending: asyncio.Task[None] | None = None
        self._cleaning: asyncio.Task[None] | None = None
        self.is_open = False

    async def open(self) -> None:
        """Connect and check.

        Raises:
            SetupError: it cannot work like this; says what to do.
            StoreError: nobody answered within ten seconds.
        """
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                remarks = await self._keeper.open()
        except BaseException as error:
            await self._keeper.close()
            if isinstance(error, TimeoutError):
                raise StoreError(f"{self._keeper.where} did not answer within {OPEN_TIMEOUT_S:g} s") from error
            raise
        for remark in remarks:
            log.warning("%s: %s", self._keeper.where, remark)
        self.is_open = True
        self._cleaning = asyncio.get_running_loop().create_task(self._keep_clean())

    async def close(self) -> None:
        """Answer what was asked for, and disconnect."""
        self.is_open = False
        if self._cleaning is not None:
            self._cleaning.cancel()
            await asyncio.gather(self._cleaning, return_exceptions=True)
        self._send_soon()  # what is in doubt
        while self._sending is not None:  # each round trip has a deadline
            await asyncio.wait((self._sending,))
        await self._keeper.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        await self.close()

    # ── the port ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def claim(self, key: str, lease: timedelta) -> Claim:
        self._must_be_open()
        kept_as = digest(key)
        answer: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        wish = self._wishes.get(kept_as)
        if wish is None:
            self._wishes[kept_as] = int(lease.total_seconds() * 1000), [answer]
            self._send_soon()
        else:
            wish[1].append(answer)
        return await answer

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        return await self._changed(Change(digest(key), token, int(lease.total_seconds() * 1000), is_held=True))

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        return await self._changed(Change(digest(key), token, int(keep.total_seconds() * 1000), is_held=False))

    async def free(self, key: str, token: str) -> bool:
        return await self._changed(Change(digest(key), token, 0, is_held=False))

    def _changed(self, change: Change) -> asyncio.Future[bool]:
        self._must_be_open()
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if change.key in self._changes:  # two changes of one key: in turn
            self._later.append((change, answer))
        else:
            self._changes[change.key] = change, answer
            self._send_soon()
        return answer

    def _must_be_open(self) -> None:
        if not self.is_open:
            raise StoreError(f"the store at {self._keeper.where} is not open: use `async with store:`")

    # ── round trips ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _send_soon(self) -> None:
        # In the next turn of the loop; until then, and while another round trip is on its way, more comes together.
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        try:
            while (self._wishes or self._changes or self._in_doubt) and await self._turn():
                pass
        finally:
            self._sending = None

    async def _turn(self) -> bool:
        """One round trip, with all that has been asked for so far; False if it was not answered."""
        wishes, self._wishes = self._wishes, {}
        changes, self._changes = self._changes, {}
        later, self._later = self._later, []
        for change, answer in later:
            if change.key in self._changes:
                self._later.append((change, answer))
            else:
                self._changes[change.key] = change, answer
        given_back = {change.key: change for change in self._in_doubt if change.key not in changes}
        self._turns += 1
        token = f"{self._name}-{self._turns}"
        asked = (
            [Wish(key, lease_ms) for key, (lease_ms, _) in wishes.items()],
            [*given_back.values(), *(change for change, _ in changes.values())],
        )
        try:
            claims, changed = await self._ask(lambda: self._keeper.turn(token, *asked))
        except StoreError as error:
            self._in_doubt.extend(Change(key, token, 0, is_held=False) for key in wishes)
            # What was asked for meanwhile would only wait as long, for the same.
            self._refuse(str(error), [wishes, self._wishes], [*changes.values(), *self._changes.values(), *self._later])
            self._wishes, self._changes, self._later = {}, {}, []
            return False
        if given_back:
            still = [change for change in self._in_doubt if given_back.get(change.key) is not change]
            self._in_doubt = deque(still, MOST_IN_DOUBT)
        for key, (lease_ms, callers) in wishes.items():
            self._tell(key, claims[key], lease_ms, callers)
        for key, (_, answer) in changes.items():
            if not answer.done():
                answer.set_result(key in changed)
        return True

    def _tell(self, key: str, claim: Claim, lease_ms: int, callers: Sequence[asyncio.Future[Claim]]) -> None:
        for answer in callers:
            if answer.done():  # whoever asked has gone
                continue
            answer.set_result(claim)
            if isinstance(claim, Mine):  # to the next, who asked for it as well, it is somebody else's
                claim = Theirs(timedelta(milliseconds=lease_ms))
        if isinstance(claim, Mine):
            self._in_doubt.append(Change(key, claim.token, 0, is_held=False))

    def _refuse(
        self,
        why: str,
        wishes: Iterable[Mapping[str, tuple[int, Sequence[asyncio.Future[Claim]]]]],
        changes: Iterable[tuple[Change, asyncio.Future[bool]]],
    ) -> None:
        asked: list[asyncio.Future[Any]] = [answer for _, answer in changes]
        asked += [answer for of_a_turn in wishes for _, callers in of_a_turn.values() for answer in callers]
        for answer in asked:
            if not answer.done():
                answer.set_exception(StoreError(why))

    async def _ask(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The keeper's answer, and a StoreError for whatever else it comes to."""
        try:
            async with self._one_at_a_time, asyncio.timeout(base.ANSWER_TIMEOUT_S):
                return await ask()
        except StoreError:
            raise
        except TimeoutError as error:
            raise StoreError(f"{self._keeper.where} did not answer within {base.ANSWER_TIMEOUT_S:g} s") from error
        except Exception as error:
            raise StoreError(f"{self._keeper.where}: {type(error).__name__}") from error

    # ── cleaning up ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_clean(self) -> None:
        while True:
            await asyncio.sleep(CLEAN_EVERY_S * random.uniform(0.5, 1.5))  # workers that began together do not meet
            try:
                removed = CLEAN_AT_ONCE
                while removed == CLEAN_AT_ONCE:
                    removed = await self._ask(lambda: self._keeper.clean(CLEAN_AT_ONCE))
                    await asyncio.sleep(CLEAN_PAUSE_S)
            except StoreError as error:
                log.warning("expired keys could not be removed, the next try is in %g s: %s", CLEAN_EVERY_S, error)
