"""Running services: connect, declare, consume; and stop so that nothing is lost and little is done twice.

`Engine` is a set of services on one transport, whatever it was built from; `Worker` builds it from URLs, the testing
harness from an embedded broker of its own. Order of a start: check everything, declare, enter lifespans, consume. Order
of a stop: take nothing more, settle what was taken, hand back the rest, leave lifespans, disconnect.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from eventbus import garbage
from eventbus.bus import Sender, open_or_close
from eventbus.clock import Clock, SystemClock
from eventbus.consumer import Environment, ServiceConsumer, backoffs
from eventbus.errors import SetupError, StoreError, TransportError, hide_password
from eventbus.idempotency import IdempotencyStore, MemoryStore, SharedStore
from eventbus.idempotency import from_url as store_from_url
from eventbus.idempotency.base import Mine, OnlyStoreErrors
from eventbus.service import Service, Subscription, check_all
from eventbus.settings import Settings
from eventbus.topology import Names, Topology, merge, of_service, shared
from eventbus.transport import from_url
from eventbus.transport.base import CONNECT_TIMEOUT_S, Consumer, Declare, Source

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from eventbus.outbox.relay import Relay

log = logging.getLogger("eventbus.worker")

DEFAULT_GRACE = timedelta(seconds=30)
LAST_WAIT_S = 2.0  # for what is left of a program after its worker has ended
CALM_S = 60.0  # trouble that comes back within this is the same trouble

# Asks somebody else whether all is well: None if so, else what is wrong. It may take its time.
Probe = Callable[[], Awaitable[str | None]]


def topology_of(names: Names, subscriptions: dict[str, tuple[Subscription, ...]]) -> Topology:
    """Everything that services with these *subscriptions* need."""
    return merge(
        [
            shared(names),
            *(
                of_service(names, service, [pattern for s in wanted for pattern in s.patterns])
                for service, wanted in subscriptions.items()
            ),
        ]
    )


class Engine:
    """Services on one transport, from the first delivery to the last settlement."""

    def __init__(
        self,
        services: tuple[Service[Any], ...],
        sender: Sender,
        store: IdempotencyStore,
        *,
        declare: Declare = "apply",
        clock: Clock | None = None,
        jitter: Callable[[], float] | None = None,
        on_committed: Callable[[AsyncEngine], Awaitable[None]] | None = None,
    ) -> None:
        """*on_committed* is called after the transaction of a handler, where no relay looks at its outbox."""
        self._subscriptions = check_all(services)
        self._topology = topology_of(sender.names, self._subscriptions)
        self._sender = sender
        # Ours keep to the port by themselves.
        self._store = store if isinstance(store, MemoryStore | SharedStore) else OnlyStoreErrors(store)
        self._declare = declare
        environment = Environment(sender, self._store, clock or SystemClock(), self._trouble, on_committed)
        if jitter is not None:
            environment = replace(environment, jitter=jitter)
        self.consumers = [ServiceConsumer(s, self._subscriptions[s.name], environment) for s in services]
        self._consumer: Consumer | None = None
        self._lifespans = AsyncExitStack()
        self._is_stopping = False
        self._troubled_by: str | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._recovery_backoffs = backoffs()
        self._recovered_s = 0.0  # when consuming went on, on the event loop's clock
        self._failure: Exception | None = None
        self._has_failed = asyncio.Event()

    @property
    def subscriptions(self) -> dict[str, tuple[Subscription, ...]]:
        return self._subscriptions

    async def start(self, within_s: float = CONNECT_TIMEOUT_S) -> None:
        """Enter the lifespans, which take the time that they take; then consume, *within_s*.

        Raises:
            SetupError, TransportError, or whatever a lifespan raised; then nothing is left running.
        """
        try:
            for consumer in self.consumers:
                if consumer.service.lifespan is not None:
                    consumer.state = await self._lifespans.enter_async_context(
                        consumer.service.lifespan(consumer.service)
                    )
            await self._consume(within_s)
        except BaseException:
            await self._end()
            raise

    async def _consume(self, within_s: float) -> None:
        self._consumer = self._sender.transport.consumer(list(self._sources()), self._topology, self._declare)
        await self._consumer.start(within_s)

    def _sources(self) -> Iterator[Source]:
        by_name = {consumer.service.name: consumer for consumer in self.consumers}
        for name, queue in self._queues():
            yield Source(queue, by_name[name].service.prefetch, by_name[name].deliver)

    def _queues(self) -> Iterator[tuple[str, str]]:
        """Each service's name with each queue that it consumes."""
        names = self._sender.names
        for consumer in self.consumers:
            # Two queues, so that neither fresh events nor retries wait behind the other.
            yield consumer.service.name, names.queue(consumer.service.name)
            yield consumer.service.name, names.retry_queue(consumer.service.name)

    def problems(self) -> list[str]:
        """What is known to keep these services from their work, a line each. Asked now and then, never waits."""
        assert self._consumer is not None
        missing, found = self._consumer.missing(), []
        for name, queue in self._queues():
            if queue in missing:
                why = missing[queue] if self._troubled_by is None else f"consuming pauses: {self._troubled_by}"
                found.append(f"{name}: queue {queue} is not consumed: {why}")
        for name, relay in self._relays().items():
            found += [f"{name}: relay: {problem}" for problem in relay.problems()]
        obstacle = self._sender.transport.obstacle()
        return found if obstacle is None else [*found, f"publishing: {obstacle}"]

    def probes(self) -> Mapping[str, Probe]:
        """What only asking tells, by what it is about."""
        of_relays = {
            f"{name}: relay: {about}": probe
            for name, relay in self._relays().items()
            for about, probe in relay.probes().items()
        }
        return {"publishing": self._sender.probe, "idempotency store": self._probe_store, **of_relays}

    def _relays(self) -> dict[str, Relay]:
        """The relays that lifespans have yielded as `.relay`, by service."""
        outbox = sys.modules.get("eventbus.outbox.relay")  # not loaded: nobody here has made one
        found = {consumer.service.name: getattr(consumer.state, "relay", None) for consumer in self.consumers}
        return {name: relay for name, relay in found.items() if outbox and isinstance(relay, outbox.Relay)}

    async def wait(self) -> None:
        """Until consuming ends; raises what it cannot recover from."""
        assert self._consumer is not None
        consuming = asyncio.ensure_future(self._consumer.wait())
        failing = asyncio.ensure_future(self._has_failed.wait())
        try:
            await asyncio.wait((consuming, failing), return_when=asyncio.FIRST_COMPLETED)
            if consuming.done():
                consuming.result()
            if self._failure is not None:
                raise self._failure
        finally:
            consuming.cancel()
            failing.cancel()
            await asyncio.gather(consuming, failing, return_exceptions=True)

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Drain within *grace_s*, or until *hurry* is set; then hand back the rest and end."""
        try:
            await self._drain(grace_s, hurry)
        finally:
            await self._end()

    async def _drain(self, grace_s: float, hurry: asyncio.Event) -> None:
        self._is_stopping = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        assert self._consumer is not None
        await self._consumer.stop()
        draining = asyncio.gather(*(consumer.drain(grace_s) for consumer in self.consumers))
        hurried = asyncio.ensure_future(hurry.wait())
        await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        draining.cancel()
        await asyncio.gather(draining, hurried, return_exceptions=True)
        unsettled = [consumer.service.name for consumer in self.consumers if not consumer.is_idle]
        if unsettled:
            log.warning(
                "the grace period ended: unsettled deliveries of %s go back to the broker", ", ".join(unsettled)
            )

    async def _end(self) -> None:
        try:
            await asyncio.gather(*(consumer.force() for consumer in self.consumers))
            if self._consumer is not None:
                await self._consumer.close()
        finally:
            await self._lifespans.aclose()

    # ── trouble: the store is down, or copies are not taken ─────────────────────────────────────────────────────────

    def _trouble(self, why: str) -> None:
        if self._is_stopping:  # what is unsettled goes back in a moment anyway
            return
        self._troubled_by = why
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def _recover(self) -> None:
        """Pause until it is better; again if trouble was told of while consuming was about to go on."""
        assert self._consumer is not None
        loop = asyncio.get_running_loop()
        # Each pause hands everything back and counts as a delivery of it. Trouble that comes back at once must not use
        # up the delivery limit: its pauses grow.
        if loop.time() - self._recovered_s > CALM_S:
            self._recovery_backoffs = backoffs()
        try:
            while self._troubled_by is not None:
                log.error("consuming pauses: %s; what is held goes back to the broker", self._troubled_by)
                await self._consumer.pause()
                await self._until_better()
                self._troubled_by = None
                await self._consumer.resume()
                self._recovered_s = loop.time()
        except Exception as error:  # noqa: BLE001  # it ends the worker: `wait` raises it
            self._failure = error
            self._has_failed.set()
        else:
            log.info("consuming goes on")

    async def _until_better(self) -> None:
        for backoff_s in self._recovery_backoffs:
            await asyncio.sleep(backoff_s)
            if await self._probe_store() is None and all(consumer.stuck == 0 for consumer in self.consumers):
                return

    async def _probe_store(self) -> str | None:
        """Why the store takes no claims (one that can only be read would not do); None if it does."""
        key = f"eventbus/is-the-store-there/{uuid4()}"
        try:
            claim = await self._store.claim(key, timedelta(seconds=1))
            if isinstance(claim, Mine):
                await self._store.free(key, claim.token)
        except StoreError as error:
            return f"it does not answer: {error}"
        return None


class Worker:
    """Runs *services*; an async context manager.

    *url*, *namespace* and *idempotency* default to EVENTBUS_URL, EVENTBUS_NAMESPACE and EVENTBUS_IDEMPOTENCY
    (`memory://`: duplicates are recognised within this process only; `redis://`, `sqlite:///path` and `postgresql://`
    are shared). Leaving the block takes nothing more and gives
    what was taken *grace* to be settled; the rest goes back to the broker.
    """

    def __init__(
        self,
        *services: Service[Any],
        url: str | None = None,
        idempotency: str | IdempotencyStore | None = None,
        namespace: str | None = None,
        grace: timedelta = DEFAULT_GRACE,
    ) -> None:
        if grace < timedelta(0):
            raise SetupError(f"grace={grace} must be zero or more")
        self._services = services
        self._url, self._namespace, self._idempotency = url, namespace, idempotency
        self._grace_s = grace.total_seconds()
        self._engine: Engine | None = None
        self._sender: Sender | None = None
        self._fatal: Exception | None = None
        self._waiting = 0
        self._hurry = asyncio.Event()
        self._asked_to_stop = asyncio.Event()
        self._has_started = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Check, connect to the idempotency store and to the broker, enter the lifespans, declare, and consume: within
        15 s, besides what the lifespans take.

        Raises:
            SetupError: mistakes of all services, one a line, or what the broker or the store will never allow.
            TransportError, StoreError: nobody answered.
        """
        if self._running is not None:
            raise SetupError("this worker has run already: make a new one")
        check_all(self._services)
        settings = Settings.load()
        names = Names(self._namespace or settings.namespace)
        url = self._url or settings.url
        given = self._idempotency or settings.idempotency
        store = store_from_url(given) if isinstance(given, str) else given
        transport = from_url(url, max_message_bytes=settings.max_message_bytes, has_lane=settings.has_lane)
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + CONNECT_TIMEOUT_S

        async def open_broker() -> None:
            await open_or_close(transport, names, settings)
            connected.push_async_callback(transport.close)

        async with AsyncExitStack() as connected:
            connected.enter_context(garbage.rarely())
            # Side by side: each may take most of the time there is. The store, which takes less, is opened to its end
            # even where the broker refuses: SQLite's driver, cancelled half-way, leaves a thread behind.
            broker = loop.create_task(open_broker())
            try:
                await self._open_store(store, connected)
                await broker
            except StoreError as error:
                refused = broker.exception() if broker.done() and not broker.cancelled() else None
                if isinstance(refused, SetupError):
                    raise refused from error  # that one never goes away by itself
                raise
            finally:
                broker.cancel()
                await asyncio.gather(broker, return_exceptions=True)
            self._sender = Sender(transport, names)
            self._engine = Engine(self._services, self._sender, store, declare=settings.declare)
            left_s = ends_s - loop.time()
            self._running = loop.create_task(self._run(self._engine, left_s, connected.pop_all()))
        await self._started(self._running)
        if isinstance(store, MemoryStore) and url is not None and url.startswith("amqp"):
            log.warning("idempotency is memory://: duplicates are recognised within this process only")
        return self

    async def _started(self, running: asyncio.Task[None]) -> None:
        started = asyncio.ensure_future(self._has_started.wait())
        try:
            await asyncio.wait((running, started), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise
        finally:
            started.cancel()
        if not self._has_started.is_set():
            await running  # raises why

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()
        await self._stopped()
        if self._fatal is not None and e is None:
            raise self._fatal

    async def wait(self) -> None:
        """Return when the worker has stopped.

        Raises:
            SetupError: what stopped it, where it stopped by itself.
        """
        self._waiting += 1
        try:
            await self._stopped()
        finally:
            self._waiting -= 1
        if self._fatal is not None:
            raise self._fatal

    def _stop(self, *, hurry: bool = False) -> None:
        """Begin to stop; with *hurry*, hand handlers at work back to the broker without waiting for them."""
        self._asked_to_stop.set()
        if hurry:
            self._hurry.set()

    async def _stopped(self) -> None:
        if self._running is None:
            raise SetupError("the worker is not running: use it inside `async with Worker(...) as worker:`")
        # Shielded: whoever waits may give up, the worker still drains.
        await asyncio.shield(self._running)

    async def _run(self, engine: Engine, within_s: float, connected: AsyncExitStack) -> None:
        """Start, go on until asked to stop, and stop: one task, as lifespans with task groups in them need it."""
        async with connected:
            await engine.start(within_s)
            self._has_started.set()
            try:
                await self._until_told(engine)
            finally:
                await engine.stop(self._grace_s, self._hurry)

    async def _until_told(self, engine: Engine) -> None:
        consuming = asyncio.ensure_future(engine.wait())
        asked = asyncio.ensure_future(self._asked_to_stop.wait())
        try:
            await asyncio.wait((consuming, asked), return_when=asyncio.FIRST_COMPLETED)
            if consuming.done():
                error = consuming.exception()
                self._fatal = error if isinstance(error, Exception) else None
                if self._fatal is not None and not self._waiting:  # who waits is told by what `wait` raises
                    log.error("the worker ends: %s", self._fatal)
        finally:
            consuming.cancel()
            asked.cancel()
            await asyncio.gather(consuming, asked, return_exceptions=True)

    async def _open_store(self, store: IdempotencyStore, connected: AsyncExitStack) -> None:
        """Open what was made from an URL. A store that was passed is opened, and closed, by whoever passed it."""
        if not isinstance(store, SharedStore):
            return
        if store is not self._idempotency:
            await store.open()
            connected.push_async_callback(store.close)
        elif not store.is_open:
            raise SetupError("the idempotency store is not open: enter it first, `async with store:`, or pass its URL")

    def _describe(self) -> list[str]:
        """What runs, a line each, for people: the broker, each service, its handlers and their policies."""
        assert self._sender is not None
        assert self._engine is not None
        broker = self._sender.transport.broker
        where = broker.host if broker.port is None else f"{broker.host}:{broker.port}"
        lines = [f"broker   {broker.product} {broker.version} at {where}, namespace {self._sender.names.namespace}"]
        store = self._idempotency or Settings.load().idempotency
        shown = hide_password(store) if isinstance(store, str) else type(store).__name__
        for service in self._services:
            lines.append(f"service  {service.name}  (prefetch {service.prefetch}, concurrency {service.concurrency})")
            for s in self._engine.subscriptions[service.name]:
                timeout = f"timeout {s.timeout.total_seconds():g} s"
                lines.append(f"  {s.handler:<20} {', '.join(s.patterns)} as {s.reads}; {s.retry}; {timeout}")
        lines.append(f"idempotency  {shown}")
        return lines


def problems_of(worker: Worker) -> list[str]:
    """What keeps *worker* from its work as far as it knows, a line each; none if it is ready. Never waits."""
    engine, running = worker._engine, worker._running
    if worker._fatal is not None:
        return [f"the worker ends: {worker._fatal}"]
    if worker._asked_to_stop.is_set():
        return ["stopping: nothing more is taken, handlers at work may finish"]
    if engine is None or running is None:
        return ["starting: no broker has answered yet"]
    if running.done():
        return ["the worker has ended"]
    if not worker._has_started.is_set():
        return ["starting: lifespans are entered, then the queues are consumed"]
    return engine.problems()


def probes_of(worker: Worker) -> Mapping[str, Probe]:
    """What *worker* can only know by asking others, by what it is about; nothing while it does not run."""
    runs = worker._has_started.is_set() and not worker._asked_to_stop.is_set() and worker._fatal is None
    return worker._engine.probes() if runs and worker._engine is not None else {}


async def serve(worker: Worker, announce: Callable[[str], None]) -> None:
    """Run *worker* until SIGTERM or SIGINT; a second one hurries. *announce* is given what runs, line by line.

    Raises:
        SetupError, TransportError, StoreError: it could not start, or could not go on.
    """
    loop, serving = asyncio.get_running_loop(), asyncio.current_task()
    assert serving is not None
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        announce("stopping: waiting for handlers at work (again to hurry)" if signals == 1 else "stopping now")
        if worker._running is None or (signals > 1 and not worker._has_started.is_set()):
            serving.cancel()  # nothing was taken yet, or nobody waits for it
        else:
            worker._stop(hurry=signals > 1)

    # Before the start: events are handled while the last queue is not consumed yet, and a signal that nobody awaits
    # would end the process in the middle of them.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        async with worker:
            garbage.never_in_what_was_loaded()
            for line in [] if signals else [*worker._describe(), "ready"]:
                announce(line)
            await worker.wait()
    except asyncio.CancelledError:
        if not signals:
            raise
        serving.uncancel()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def run_to_the_end(serving: Coroutine[Any, Any, None]) -> None:
    """Run *serving* in an event loop of its own, and return `LAST_WAIT_S` after its end at the latest.

    A handler that does not let itself be cancelled, or a thread that one waits for, would keep the process for ever;
    its delivery has gone back to the broker by then. The process ends with exit code 1 instead.
    """
    last: list[threading.Timer] = []

    async def served() -> None:
        try:
            await serving
        finally:
            last.append(threading.Timer(LAST_WAIT_S, _leave))
            last[0].daemon = True
            last[0].start()

    try:
        asyncio.run(served())
    finally:
        for timer in last:
            timer.cancel()


def _leave() -> None:
    print("error: a handler did not end, and was left behind", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def run(
    *services: Service[Any],
    url: str | None = None,
    idempotency: str | IdempotencyStore | None = None,
    namespace: str | None = None,
    grace: timedelta = DEFAULT_GRACE,
) -> None:
    """Run *services* until SIGTERM or SIGINT; what cannot work is one line on stderr and exit code 1."""
    try:
        worker = Worker(*services, url=url, idempotency=idempotency, namespace=namespace, grace=grace)
        run_to_the_end(serve(worker, lambda line: print(line, flush=True)))  # noqa: T201  # a program's own output
    except (SetupError, TransportError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1) from None
