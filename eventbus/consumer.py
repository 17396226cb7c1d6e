"""One service's deliveries: attempt, decide, settle.

What must not happen here: an ack before the copy that replaces the original is confirmed; a handler that runs without
a claim; a handler that is cancelled because a connection died (it goes on, and its claim tells the redelivery that the
work is done). Decisions are `delivery.decide`'s; this module carries them out.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from eventbus import message as header
from eventbus.bus import Sender
from eventbus.clock import Clock, Timer
from eventbus.context import AlreadyDone, Context, Unit
from eventbus.delivery import (
    Ack,
    Again,
    Cancelled,
    ClaimedElsewhere,
    DeadLetter,
    Duplicate,
    Failed,
    Handled,
    Nothing,
    Outcome,
    Postponed,
    Refused,
    StoreDown,
    Unmatched,
    decide,
)
from eventbus.dispatch import Dispatch, Interest, UnknownVersion
from eventbus.envelope import Envelope, decode
from eventbus.errors import EnvelopeError, Reject, RetryLater, StoreError
from eventbus.failure import failure_of, one_line, text_of
from eventbus.idempotency.base import KEEP_DONE, LEASE, Done, IdempotencyStore, Mine, Theirs
from eventbus.message import Message
from eventbus.service import Service, Subscription
from eventbus.slots import Slots
from eventbus.telemetry import fields
from eventbus.transport.base import Delivery, NotPublished, Unpublishable

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

log = logging.getLogger("eventbus.delivery")

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 10.0
# Where one of a burst has had to wait, so many deliveries are not taken in bursts; twice as many if it happens again.
FIRST_ALONE, MOST_ALONE = 100, 10_000

# What became of one handler's part of a delivery: settled (done, or its copy is confirmed), nothing (leave it to the
# broker), or unpublishable (no copy can be made: the broker moves the original, untouched).
Part = Literal["settled", "nothing", "unpublishable"]
_WORST_FIRST: tuple[Part, ...] = ("nothing", "unpublishable")
_HANDLED = Handled()


@dataclass(frozen=True, slots=True)
class Environment:
    """What the consumers of one worker share."""

    sender: Sender
    store: IdempotencyStore
    clock: Clock
    on_trouble: Callable[[str], None]  # consuming must pause; called with why
    on_committed: Callable[[AsyncEngine], Awaitable[None]] | None = None  # a handler's transaction; where no relay runs
    jitter: Callable[[], float] = lambda: random.uniform(-1.0, 1.0)


@dataclass(slots=True, eq=False)
class _Work:
    """One handler's part of a delivery; no interest where nothing here wants it."""

    delivery: Delivery
    envelope: Envelope | None
    interest: Interest | None
    handler: str | None
    attempt: int  # a crash that the claim tells of counts as one
    undecodable: EnvelopeError | None = None


@dataclass(slots=True, eq=False)
class _Run:
    """A handler, what it is called with and who runs it; once it is claimed, also under which claim."""

    work: _Work
    interest: Interest
    event: BaseModel | Envelope
    envelope: Envelope
    key: str
    task: asyncio.Task[Any]
    token: str = ""
    cancelled_because: Outcome | None = None
    ends_s: float = 0.0  # on the event loop's clock: the handler's timeout
    is_overdue: bool = False

    def cancel(self, outcome: Outcome) -> None:
        if self.cancelled_because is None:
            self.cancelled_because = outcome
            self._stop()

    def time_out(self) -> None:
        if not self.is_overdue:
            self.is_overdue = True
            self._stop()

    def _stop(self) -> None:
        self.task.cancel()


class _AtWork:
    """The handlers at work. Their timeouts are behind one timer: few pass, and one for each costs more than a claim."""

    def __init__(self) -> None:
        self.runs: set[_Run] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._rings_s = math.inf

    def begin(self, run: _Run) -> float:
        """Return when that was, on the event loop's clock."""
        loop = run.task.get_loop()
        began_s = loop.time()
        run.ends_s = began_s + run.interest.timeout_s
        self.runs.add(run)
        if run.ends_s < self._rings_s:
            self._set(loop, run.ends_s)
        return began_s

    def end(self, run: _Run) -> None:
        self.runs.discard(run)

    def stop(self) -> None:
        """No timeouts any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._rings_s = None, math.inf

    def _set(self, loop: asyncio.AbstractEventLoop, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._rings_s = loop.call_at(when_s, self._ring, loop), when_s

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self._rings_s = None, math.inf
        now_s = loop.time()
        for run in self.runs:
            if run.ends_s <= now_s:
                run.time_out()
        next_s = min((run.ends_s for run in self.runs if not run.is_overdue), default=None)
        if next_s is not None:
            self._set(loop, next_s)


class ServiceConsumer:
    """Handles what the broker delivers to one service."""

    def __init__(self, service: Service[Any], subscriptions: Iterable[Subscription], environment: Environment) -> None:
        self.service = service
        self.state: object = None  # what the lifespan yielded; set before the first delivery
        self.on_attempt: Callable[[str, str], None] | None = None  # told the service and handler of each run
        self._dispatch = Dispatch(service.name, subscriptions)
        self._environment = environment
        self._telemetry, self._store, self._clock = environment.sender.telemetry, environment.store, environment.clock
        self._slots = Slots(service.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._burst: deque[Delivery] | None = None  # what came since the event loop last turned
        self._alone, self._next_alone = 0, FIRST_ALONE  # deliveries that get a task of their own from the start
        self.stuck = 0  # retries and dead letters whose copies the broker does not take
        self._forced = False
        self._renewal: Timer | None = None
        self._at_work = _AtWork()
        self._context = contextvars.copy_context()
        self._task_name = f"eventbus {service.name}"  # one for all: asyncio would make up one for each

    @property
    def is_idle(self) -> bool:
        """Whether nothing that was taken is unsettled."""
        return not self._tasks

    def deliver(self, delivery: Delivery) -> None:
        """Take *delivery*; never blocks, never raises."""
        if self._alone:
            self._alone -= 1
            self._begin(self._take_alone(delivery))
            return
        if self._burst is None:
            self._burst = deque()
            self._begin(self._take_all(self._burst))
        self._burst.append(delivery)

    def _begin(self, taking: Coroutine[Any, Any, None]) -> None:
        # Not the context of whoever called: on the embedded broker that is a publisher's, with its spans and variables.
        loop, context = asyncio.get_running_loop(), self._context.copy()
        self._tasks.add(loop.create_task(taking, name=self._task_name, context=context))

    async def drain(self, within_s: float) -> bool:
        """Wait for what was taken to be settled; False if something was not, *within_s* seconds later."""
        deadline = asyncio.get_running_loop().time() + within_s
        while self._tasks and (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(set(self._tasks), timeout=left_s)
        return not self._tasks

    async def force(self, within_s: float = 5.0) -> None:
        """Cancel the handlers that are still at work, and give their claims back.

        A handler that does not let itself be cancelled keeps its claim until the lease ends.
        """
        self._forced = True
        for run in list(self._at_work.runs):
            run.cancel(Cancelled())
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=within_s)
        for task in list(self._tasks):
            task.cancel()
        if self._renewal is not None:
            self._renewal.cancel()
        self._at_work.stop()

    # ── one delivery ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _take_all(self, burst: deque[Delivery]) -> None:
        """Take what came together, one after the other as long as nothing has to wait: a task costs as much as a claim.

        As soon as one waits, or leaves its task another one than it found, the others get tasks of their own; and so do
        those that come next, for with a store that has to be asked every first one waits: asked with all others of a
        turn it costs one round trip, asked before them two.
        """
        self._burst = None
        task, untouched, several, taken = _current_task(), contextvars.copy_context(), len(burst), 0
        if several > 1:
            task.get_loop().call_soon(self._spread_behind_one_that_waits, burst)
        try:
            while burst:
                taken += 1
                await self._take(burst.popleft(), task)
                if task.cancelling() or not _is_same(contextvars.copy_context(), untouched):
                    break
        finally:
            self._spread(burst)
            self._tasks.discard(task)
        if taken == several > 1:
            self._next_alone = FIRST_ALONE

    def _spread_behind_one_that_waits(self, burst: deque[Delivery]) -> None:
        if burst:
            self._alone, self._next_alone = self._next_alone, min(2 * self._next_alone, MOST_ALONE)
            self._spread(burst)

    def _spread(self, burst: deque[Delivery]) -> None:
        while burst:
            self._begin(self._take_alone(burst.popleft()))

    async def _take_alone(self, delivery: Delivery) -> None:
        task = _current_task()
        try:
            await self._take(delivery, task)
        finally:
            self._tasks.discard(task)

    async def _take(self, delivery: Delivery, task: asyncio.Task[Any]) -> None:
        joined = None
        try:
            joined = self._telemetry.join(delivery.message.headers)
            works = self._works(delivery)
            part = await (self._part(works[0], task) if len(works) == 1 else self._all(works))
        except Exception:
            # A bug of ours: it is handed back, so that nothing is lost and no window fills up with such deliveries.
            log.exception("a delivery of %s could not be settled", self.service.name)
            self._environment.on_trouble(f"a delivery of {self.service.name} could not be settled")
        else:
            if part == "settled":
                delivery.ack()
            elif part == "unpublishable":
                delivery.reject()
        finally:
            if joined is not None:
                self._telemetry.leave(joined)

    async def _all(self, works: list[_Work]) -> Part:
        """What became of all parts: the broker hears of the delivery once, and "nothing" goes before the others."""
        # Not a TaskGroup: a bug in one part must not cancel the handlers of the others.
        gathered = await asyncio.gather(*(self._part(work) for work in works), return_exceptions=True)
        parts = [_part_or_raise(part) for part in gathered]
        return next((part for part in _WORST_FIRST if part in parts), "settled")

    def _works(self, delivery: Delivery) -> list[_Work]:
        """Each handler's part of *delivery*; at least one."""
        message = delivery.message
        attempt = _attempt(message)
        try:
            envelope = decode(message, now=self._clock.now)
        except EnvelopeError as error:
            self._telemetry.consumed(None, delivery.queue)
            return [_Work(delivery, None, None, None, attempt, error)]
        self._telemetry.consumed(envelope.type, delivery.queue)
        named = message.headers.get(header.HANDLER)
        if isinstance(named, str):
            return [_Work(delivery, envelope, self._dispatch.of(named, envelope.type), named, attempt)]
        wanting = self._dispatch.wanting(envelope.type)
        if not wanting:
            return [_Work(delivery, envelope, None, None, attempt)]
        works = []
        for interest in wanting:  # a comprehension is a call more
            works.append(_Work(delivery, envelope, interest, interest.handler, attempt))  # noqa: PERF401
        return works

    async def _part(self, work: _Work, task: asyncio.Task[Any] | None = None) -> Part:
        try:
            ready = self._ready(work, task)
            if isinstance(ready, _Run):
                if not self._slots.take():
                    await self._slots.wait()
                try:
                    outcome = await self._claimed(ready)
                finally:
                    self._slots.give()
            else:
                outcome = ready
        except Exception as error:  # noqa: BLE001  # a bug of ours, or of a model's: to fail is better than to be stuck
            outcome = failure_of(error)
        if outcome is _HANDLED:
            return "settled"  # as `decide` says; not asked each time
        return await self._settle(work, outcome)

    def _ready(self, work: _Work, task: asyncio.Task[Any] | None) -> _Run | Outcome:
        """What is to be run, or why there is nothing to run."""
        interest, envelope = work.interest, work.envelope
        if envelope is None:
            return Refused("invalid-envelope", str(work.undecodable))
        if interest is None:
            what = f"handler {work.handler!r}" if work.handler else f"subscription to {envelope.type}"
            return Unmatched("no-handler", f"service {self.service.name!r} has no {what} in this program")
        try:
            event = interest.read(envelope)
            key = interest.idempotency_key(envelope, event)
        except UnknownVersion as error:
            return Unmatched("unknown-version", str(error))
        except EnvelopeError as error:
            return Refused(error.reason, str(error))
        # Asked for where it is not known: that costs as much as a claim.
        return _Run(work, interest, event, envelope, key, task or _current_task())

    async def _claimed(self, run: _Run) -> Outcome:
        """Claim, run, and record what came of it."""
        work = run.work
        if self._forced or not work.delivery.is_live:
            return Cancelled()
        try:
            claim = await self._store.claim(run.key, LEASE)
        except StoreError as error:
            self._environment.on_trouble(f"the idempotency store does not answer: {error}")
            return StoreDown(str(error))
        match claim:
            case Mine(token=token, crashes=crashes):
                run.token = token
                work.attempt += crashes
            case Done():
                return Duplicate()
            case Theirs(lease_left=left):
                return ClaimedElsewhere(left)
        if crashes and work.attempt > run.interest.subscription.retry.attempts:
            work.attempt -= 1  # this one is not made
            return await self._freed(run, Failed(f"its worker ended {crashes} times in the middle of it"))
        outcome = await (self._recorded(run) if self._telemetry.is_recording else self._handled(run))
        # A duplicate that the inbox knew is work that is done, too.
        if outcome is not _HANDLED and not isinstance(outcome, Duplicate):
            return await self._freed(run, outcome)
        try:
            is_ours = await self._store.complete(run.key, run.token, KEEP_DONE)
        except StoreError as error:
            return await self._complete_later(run, outcome, error)
        return outcome if is_ours else self._claim_lost(run)

    async def _recorded(self, run: _Run) -> Outcome:
        """`_handled`, with a span and its measures."""
        work = run.work
        with self._telemetry.process(
            run.envelope, work.delivery.message.headers,
            queue=work.delivery.queue, handler=run.interest.handler, attempt=work.attempt,
        ) as processing:  # fmt: skip
            outcome = await self._handled(run)
            if not isinstance(outcome, Handled | Duplicate):
                processing.error_type = outcome.kind if isinstance(outcome, Failed) else type(outcome).__name__
            return outcome

    def _context_of(self, run: _Run) -> Context[Any]:
        return Context(
            run.envelope,
            attempt=run.work.attempt,
            identity=(self.service.name, run.interest.handler, self.service.source),
            state=self.state,
            publish=self._environment.sender.send,
            inbox=(self._open_unit, run.key),
        )

    async def _handled(self, run: _Run) -> Outcome:
        """Run the handler to its end, whatever the end is."""
        interest = run.interest
        arguments: tuple[Any, ...] = (run.event,)
        if interest.takes_context:
            arguments = run.event, self._context_of(run)
        if self._renewal is None:
            self._renewal = self._clock.call_later(LEASE.total_seconds() / 3, self._renew_all)
        if self.on_attempt is not None:
            self.on_attempt(self.service.name, interest.handler)
        began_s = self._at_work.begin(run)
        try:
            await interest.function(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # a handler that calls sys.exit() must not take its neighbours along
            return _outcome_of_error(error, run)
        finally:
            self._at_work.end(run)
        if run.cancelled_because is not None:  # and it swallowed that
            _current_task().uncancel()
        if run.is_overdue:
            _current_task().uncancel()
            return Failed(f"{_timed_out(interest.timeout_s)}, and did not let itself be cancelled")
        if log.isEnabledFor(logging.DEBUG):
            self._say_handled(run, asyncio.get_running_loop().time() - began_s)
        return _HANDLED

    def _open_unit(self, state: object, key: str) -> AbstractAsyncContextManager[Unit]:
        from eventbus.outbox.inbox import open_unit  # only handlers that ask for a transaction need a database

        environment = self._environment
        return open_unit(state, key, check=environment.sender.check, committed=environment.on_committed)

    async def _freed(self, run: _Run, outcome: Outcome) -> Outcome:
        """*outcome*, with the claim given back."""
        try:
            await self._store.free(run.key, run.token)
        except StoreError as error:
            log.warning("a claim could not be given back, it ends with its lease: %s", error)
        return outcome

    async def _complete_later(self, run: _Run, outcome: Outcome, error: StoreError) -> Outcome:
        """Try until the lease ends: the work is done, and not recording it would do it twice."""
        clock = self._clock
        deadline = clock.monotonic_s() + LEASE.total_seconds()
        for backoff_s in backoffs():
            self._environment.on_trouble(f"the idempotency store does not answer: {error}")
            if clock.monotonic_s() >= deadline or self._forced:
                break
            await asyncio.sleep(backoff_s)
            try:
                is_ours = await self._store.complete(run.key, run.token, KEEP_DONE)
                return outcome if is_ours else self._claim_lost(run)
            except StoreError as again:
                error = again
        return StoreDown(str(error))

    def _claim_lost(self, run: _Run) -> Outcome:
        self._say_claim_lost(run.work, "it had done the work, and another worker may do it too")
        return ClaimedElsewhere(LEASE)

    # ── claims of handlers at work are renewed, all at a time ───────────────────────────────────────────────────────

    def _renew_all(self) -> None:
        self._renewal = None
        if self._at_work.runs and not self._forced:
            task = asyncio.get_running_loop().create_task(self._renew(list(self._at_work.runs)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._renewal = self._clock.call_later(LEASE.total_seconds() / 3, self._renew_all)

    async def _renew(self, runs: list[_Run]) -> None:
        # At once, not one after the other: a shared store answers all in one round trip.
        await asyncio.gather(*(self._renew_one(run) for run in runs))

    async def _renew_one(self, run: _Run) -> None:
        try:
            if not await self._store.renew(run.key, run.token, LEASE) and run in self._at_work.runs:
                self._say_claim_lost(run.work, "the handler is cancelled, another worker has taken over")
                run.cancel(ClaimedElsewhere(LEASE))
        except StoreError as error:
            log.warning("a claim could not be renewed: %s", error)

    # ── settling ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _settle(self, work: _Work, outcome: Outcome) -> Part:
        attempt = work.attempt
        policy = work.interest.subscription.retry if work.interest else self.service.retry
        settlement = decide(outcome, attempt, policy, jitter=self._environment.jitter())
        if isinstance(settlement, Nothing):
            return "nothing"
        if isinstance(settlement, Ack):
            if isinstance(outcome, Duplicate):
                self._say(logging.INFO, work, attempt, "duplicate", "suppressed a duplicate")
            return "settled"
        part = await self._publish_copy(work, settlement, attempt)
        if part == "settled":
            self._say_settled(work, settlement, attempt)
        return part

    async def _publish_copy(self, work: _Work, settlement: Again | DeadLetter, attempt: int) -> Part:
        """Publish what replaces the original. Until that is confirmed the original stays unsettled."""
        sender, service = self._environment.sender, self.service.name
        copy = self._copy(work, settlement, attempt)
        for backoff_s in backoffs():
            # Nothing is published for a dead session: the broker has given the original to somebody else already.
            if not work.delivery.is_live or self._forced:
                return "nothing"
            try:
                if isinstance(settlement, Again):
                    await sender.retry(service, copy, settlement.delay)
                else:
                    await sender.dead_letter(service, copy)
                return "settled"
            except Unpublishable as error:
                self._say(logging.ERROR, work, attempt, "rejected", "no copy can be published", error=error.why)
                return "unpublishable"
            except NotPublished as error:
                self._say(logging.WARNING, work, attempt, "waiting", "its copy was not confirmed", error=error.why)
            await self._wait_stuck(backoff_s)
        return "nothing"

    def _copy(self, work: _Work, settlement: Again | DeadLetter, attempt: int) -> Message:
        message = work.delivery.message
        failed = not isinstance(settlement, Again) or settlement.attempt > attempt
        exchange, key = self._origin(work)
        headers: dict[str, object] = {
            header.ORIGIN_EXCHANGE: message.headers.get(header.ORIGIN_EXCHANGE, exchange),
            header.ORIGIN_KEY: message.headers.get(header.ORIGIN_KEY, key),
        }
        if work.handler is not None:
            headers[header.HANDLER] = work.handler
        if failed:
            now = self._clock.now().astimezone(UTC).isoformat()
            headers[header.FIRST_FAILED] = message.headers.get(header.FIRST_FAILED, now)
        if isinstance(settlement, Again):
            headers[header.ATTEMPT] = settlement.attempt
        else:
            headers[header.ATTEMPT] = attempt
            headers[header.REASON] = settlement.reason
            headers[header.ERROR] = one_line(settlement.error)
            if settlement.trace:
                headers[header.TRACE] = settlement.trace
        return message.republished(headers)

    def _origin(self, work: _Work) -> tuple[str, str]:
        """Where it was published; a delayed event came by the delay tree, which says nothing to anybody."""
        names = self._environment.sender.names
        if names.is_delay(work.delivery.exchange) and work.envelope is not None:
            return names.events, work.envelope.type
        return work.delivery.exchange, work.delivery.key

    async def _wait_stuck(self, backoff_s: float) -> None:
        self.stuck += 1
        if self.stuck * 2 >= self.service.prefetch:
            self._environment.on_trouble(f"{self.stuck} retries or dead letters of {self.service.name} are not taken")
        try:
            await asyncio.sleep(backoff_s)
        finally:
            self.stuck -= 1

    # ── saying what happened ────────────────────────────────────────────────────────────────────────────────────────

    def _say_handled(self, run: _Run, took_s: float) -> None:
        handler, attempt = run.interest.handler, run.work.attempt
        extra = self._facts(run.envelope, handler, attempt, outcome="handled", duration_s=round(took_s, 6))
        log.debug("%s.%s handled %s", self.service.name, handler, run.envelope.type, extra=extra)

    def _say_settled(self, work: _Work, settlement: Again | DeadLetter, attempt: int) -> None:
        if isinstance(settlement, DeadLetter):
            self._say(
                logging.ERROR, work, attempt, "dead-lettered", f"gave up ({settlement.reason})",
                reason=settlement.reason, error=one_line(settlement.error),
            )  # fmt: skip
        elif settlement.attempt > attempt:
            self._say(
                logging.WARNING, work, attempt, "retry", f"failed, again in {settlement.delay.total_seconds():.3g} s",
                due_in_s=settlement.delay.total_seconds(), error=one_line(settlement.error),
            )  # fmt: skip
        else:
            self._say(
                logging.INFO, work, attempt, "claimed-elsewhere", "another worker is at it",
                due_in_s=settlement.delay.total_seconds(),
            )  # fmt: skip

    def _say(self, level: int, work: _Work, attempt: int, outcome: str, what: str, **facts: object) -> None:
        type_ = work.envelope.type if work.envelope is not None else "a message that is no event"
        extra = self._facts(work.envelope, work.handler, attempt, outcome=outcome, **facts)
        error = f": {facts['error']}" if "error" in facts else ""
        log.log(level, "%s.%s %s, attempt %d: %s%s", self.service.name, work.handler or "?", type_, attempt, what,
                error, extra=extra)  # fmt: skip

    def _say_claim_lost(self, work: _Work, what: str) -> None:
        # Not the key: it may be made of the event's data.
        self._say(logging.WARNING, work, work.attempt, "claim-lost", f"lost its claim, {what}")

    def _facts(
        self, envelope: Envelope | None, handler: str | None, attempt: int, **facts: object
    ) -> dict[str, object]:
        return fields(envelope, service=self.service.name, handler=handler, attempt=attempt, **facts)


def _part_or_raise(part: Part | BaseException) -> Part:
    if isinstance(part, BaseException):
        raise part
    return part


def _outcome_of_error(error: BaseException, run: _Run) -> Outcome:
    if run.is_overdue:
        _current_task().uncancel()
    if run.cancelled_because is not None:  # whatever the handler made of being cancelled
        _current_task().uncancel()
        return run.cancelled_because
    match error:
        case AlreadyDone():
            return Duplicate()
        case Reject():
            return Refused("rejected", text_of(error) or "rejected without a reason")
        case RetryLater(delay=delay):
            return Postponed(delay, text_of(error))
        case asyncio.CancelledError() if run.is_overdue and not _current_task().cancelling():
            overdue = TimeoutError().with_traceback(error.__traceback__)
            return failure_of(overdue, _timed_out(run.interest.timeout_s))
        case asyncio.CancelledError():
            if _current_task().cancelling():  # by whoever ends the event loop
                raise error
            return failure_of(error, "the handler was cancelled from within")
        case _:
            return failure_of(error)


def _timed_out(timeout_s: float) -> str:
    return f"timed out after {timeout_s:g} s"


def _attempt(message: Message) -> int:
    value = message.headers.get(header.ATTEMPT, 1)
    return value if isinstance(value, int) and value >= 1 else 1


def _is_same(context: contextvars.Context, other: contextvars.Context) -> bool:
    try:
        return context == other  # as long as nobody sets a variable this compares two pointers
    except Exception:  # noqa: BLE001  # whatever a stranger's `==` raises
        return False  # arrays, for one, do not tell whether they are equal


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def backoffs() -> Iterator[float]:
    """Seconds to wait before each further try, for ever."""
    backoff_s = FIRST_BACKOFF_S
    while True:
        yield backoff_s
        backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)
