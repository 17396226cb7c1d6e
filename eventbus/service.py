"""Who wants what: a Service and its subscriptions, as data.

Nothing here runs anything. `on` only writes down what it was given; `Service.check` reads the annotations and reports
every mistake with its place, all at once, when something is about to be started.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Generic, Never, get_args, get_origin

from pydantic import BaseModel
from typing_extensions import TypeVar

from eventbus.context import S
from eventbus.envelope import Envelope, check_source
from eventbus.errors import SetupError
from eventbus.event import LONGEST_TYPE, Catalogue, Event, is_name, split_type
from eventbus.message import matches
from eventbus.retry import Retry

# A TypeVar bound to callables that take Never: every function of one or two parameters fits, whatever it is annotated
# with, and the decorator returns it unchanged, without Any and without overloads.
Handler = Callable[[Never], Awaitable[None]] | Callable[[Never, Never], Awaitable[None]]
H = TypeVar("H", bound=Handler)
Key = str | tuple[str, ...] | Callable[[Never], str]

# 3.10 to 4.2 close the channel after 30 minutes without an ack; five are for the drain and the settlement.
LONGEST_TIMEOUT = timedelta(minutes=25)
DEFAULT_TIMEOUT = timedelta(seconds=30)

RESERVED = frozenset({"dead", "delay", "due", "undeliverable"})
# Short enough for the names made of it: a queue's has 255 bytes, and so has a retry's routing key.
_SERVICE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,99}")
_WHOLE_WORD = re.compile(r"[^.*#\s]+|\*|#")
_VERSION_WORD = re.compile(r"v[0-9]+")


@dataclass(frozen=True, slots=True)
class Reads:
    """What a handler can read, from its annotation: exactly one of the three."""

    events: Mapping[str, type[Event]] | None = None  # by type
    model: type[BaseModel] | None = None  # a plain model: whatever comes
    envelope: bool = False

    @property
    def models(self) -> tuple[type[BaseModel], ...]:
        """Every class that an event may be read as."""
        if self.events is not None:
            return tuple(self.events.values())
        return () if self.model is None else (self.model,)

    def __str__(self) -> str:
        if self.events is not None:
            return " | ".join(self.events)
        return "envelope" if self.model is None else self.model.__name__


@dataclass(frozen=True, slots=True)
class Subscription:
    """Event names, handler and policy, checked."""

    handler: str
    function: Callable[..., Awaitable[None]]
    patterns: tuple[str, ...]
    reads: Reads
    takes_context: bool
    retry: Retry
    timeout: timedelta
    key: Key | None
    where: str

    def wants(self, type_: str) -> bool:
        """Whether an event of *type_* is this handler's."""
        return any(matches(pattern, type_) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class _Registration:
    """What `on` was given, unchecked."""

    function: Callable[..., Awaitable[None]]
    names: tuple[str | type[Event], ...]
    retry: Retry | None
    timeout: timedelta | None
    key: Key | None
    name: str | None
    where: str
    namespace: Mapping[str, object]

    @property
    def handler(self) -> str:
        return str(self.name or getattr(self.function, "__name__", repr(self.function)))


class Service(Generic[S]):
    """A set of handlers that share a queue.

    *lifespan* is a function of the service that returns an async context manager; it is entered before the first
    delivery, and what it yields is `context.state`. *prefetch* bounds what the broker hands out unsettled, per queue
    (behind a slow handler a quarter more, and twice as much for a moment);
    *concurrency* how many handlers run at a time. *retry* and *timeout* (25 minutes at most) hold for every handler
    that does not say otherwise. Events that handlers publish come from *source*, `/services/<name>` by default.

    Raises:
        SetupError: a value that can never work.
    """

    def __init__(
        self,
        name: str,
        *,
        retry: Retry = Retry(),
        timeout: timedelta = DEFAULT_TIMEOUT,
        lifespan: Callable[[Service[Any]], AbstractAsyncContextManager[S]] | None = None,
        prefetch: int = 100,
        concurrency: int = 100,
        catalogue: Catalogue | None = None,
        source: str | None = None,
    ) -> None:
        check_service_name(name)
        if not _is_whole(prefetch) or not 1 <= prefetch <= 65_535:
            raise SetupError(f"service {name!r}: prefetch={prefetch!r} must be between 1 and 65535")
        if not _is_whole(concurrency) or concurrency < 1:
            raise SetupError(f"service {name!r}: concurrency={concurrency!r} must be at least 1")
        if problem := _timeout_problem(timeout) or _retry_problem(retry):
            raise SetupError(f"service {name!r}: {problem}")
        self._name = name
        self.retry = retry
        self.timeout = timeout
        self.lifespan = lifespan
        self.prefetch = prefetch
        self.concurrency = concurrency
        self.catalogue = catalogue
        self.source = f"/services/{name}" if source is None else source
        check_source(self.source)
        self._registrations: list[_Registration] = []

    @property
    def name(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"Service({self._name!r})"

    def on(
        self,
        *names: str | type[Event],
        retry: Retry | None = None,
        timeout: timedelta | None = None,
        idempotency_key: Key | None = None,
        name: str | None = None,
    ) -> Callable[[H], H]:
        """Subscribe an `async def` of `(event)` or `(event, context)`; the function is returned unchanged.

        *names*: an event's name (every version of it), a type such as `order_placed.v1`, an event class (its own
        version), or an AMQP pattern over types in which `*` and `#` are whole words (`payments.#`). What the handler
        can read is its first annotation: an event class, a union of them, a pydantic model, or `Envelope`.

        *idempotency_key* names the field, the fields or a function of the event that tells one piece of work from
        another, in place of the event's source and id: a second event of the same name with an equal key within seven
        days is dropped as a duplicate, on purpose.

        The handler is known by *name*, or its own: renaming it makes retries and dead letters that name it homeless.
        """

        def register(function: H) -> H:
            frame = sys._getframe(1)
            code = getattr(function, "__code__", None)
            where = (
                f"{code.co_filename}:{code.co_firstlineno}" if code else f"{frame.f_code.co_filename}:{frame.f_lineno}"
            )
            self._registrations.append(
                _Registration(function, names, retry, timeout, idempotency_key, name, where, _locals(function, frame))
            )
            return function

        return register

    def replace(self, *, lifespan: Callable[[Service[Any]], AbstractAsyncContextManager[S]]) -> Service[S]:
        """This service with another *lifespan*: the same handlers on other resources, for tests."""
        other = copy.copy(self)
        other._registrations = list(self._registrations)  # a handler that a test adds is the test's
        other.lifespan = lifespan
        return other

    def subscriptions(self) -> tuple[Subscription, ...]:
        """What this service wants.

        Raises:
            SetupError: naming every mistake, one a line.
        """
        subscriptions, mistakes = self.check()
        if mistakes:
            raise SetupError("\n".join(mistakes))
        return subscriptions

    def check(self) -> tuple[tuple[Subscription, ...], list[str]]:
        """The subscriptions that are right, and a line with file and line number for each mistake."""
        good: list[Subscription] = []
        mistakes: list[str] = []
        seen: set[str] = set()
        for registration in self._registrations:
            problems: list[str] = []
            subscription = _check(self, registration, problems)
            handler = registration.handler
            if handler in seen:
                problems.append(f"a second handler called {handler!r}: give one of them name=...")
            seen.add(handler)
            mistakes += [f"{registration.where}: {self._name}.{handler}: {problem}" for problem in problems]
            if subscription is not None and not problems:
                good.append(subscription)
        if problem := _lifespan_problem(self.lifespan):
            mistakes.append(f"service {self._name!r}: {problem}")
        if not self._registrations:
            mistakes.append(
                f"service {self._name!r} subscribes to nothing: decorate a handler with @{self._name}.on(...)"
            )
        return tuple(good), mistakes


def check_service_name(name: str) -> None:
    """Raises:
    SetupError: *name* would collide with a name of the topology, or AMQP tools could not quote it.
    """
    if not isinstance(name, str) or not _SERVICE_NAME.fullmatch(name):
        raise SetupError(
            f"{name!r} is no service name: use lower-case letters, digits, '_' and '-', a letter first, 100 at most"
        )
    if name in RESERVED:
        raise SetupError(f"the service name {name!r} is taken by the bus itself ({', '.join(sorted(RESERVED))})")


def check_all(services: tuple[Service[Any], ...]) -> dict[str, tuple[Subscription, ...]]:
    """The subscriptions of *services*, by service name.

    Raises:
        SetupError: every mistake of all services, one a line.
    """
    checked: dict[str, tuple[Subscription, ...]] = {}
    mistakes: list[str] = []
    if not services:
        mistakes.append("no service to run: give at least one")
    for service in services:
        if service.name in checked:
            mistakes.append(f"two services are called {service.name!r}: they would share a queue and split its events")
        checked[service.name], more = service.check()
        mistakes += more
    if mistakes:
        raise SetupError("\n".join(mistakes))
    return checked


def _locals(function: Callable[..., object], frame: FrameType) -> Mapping[str, object]:
    """What annotations inside a function may name besides their module's globals: the locals of that function.

    Nothing where the handler comes from elsewhere: the names there are not its own.
    """
    written = _written(function)
    is_inside = frame.f_locals is not frame.f_globals and frame.f_globals is getattr(written, "__globals__", None)
    return frame.f_locals if is_inside else {}


def _written(function: Callable[..., object]) -> Callable[..., object]:
    """The function that somebody wrote and annotated, behind a partial or a callable object."""
    if isinstance(function, functools.partial):
        return _written(function.func)
    if inspect.ismethod(function):
        return _written(function.__func__)
    return function if inspect.isroutine(function) else type(function).__call__


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _lifespan_problem(lifespan: object) -> str | None:
    """A generator without its decorator would be found out in the middle of the start."""
    if lifespan is None or (callable(lifespan) and not _is_undecorated(lifespan)):
        return None
    code = getattr(lifespan, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return (
        f"lifespan={getattr(lifespan, '__name__', repr(lifespan))}{where} is no function of the service that returns "
        "an async context manager: decorate an `async def` that yields once with @contextlib.asynccontextmanager"
    )


def _is_undecorated(function: object) -> bool:
    return (
        inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
    )


def _retry_problem(retry: Retry) -> str | None:
    return None if isinstance(retry, Retry) else f"retry={retry!r} is no Retry: say retry=Retry(attempts=...)"


def _timeout_problem(timeout: timedelta) -> str | None:
    if not isinstance(timeout, timedelta):
        return f"timeout={timeout!r} is no timedelta: say timeout=timedelta(seconds=...)"
    if timeout <= timedelta(0):
        return f"timeout={timeout} must be longer than zero"
    if timeout > LONGEST_TIMEOUT:
        return (
            f"timeout={timeout} is over {LONGEST_TIMEOUT}: brokers up to 4.2 close the channel of a delivery that is "
            "not acked within 30 minutes; split the work, or hand it on with an event"
        )
    return None


def _check(service: Service[Any], given: _Registration, problems: list[str]) -> Subscription | None:
    handler = given.handler
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}", handler):
        problems.append(f"{handler!r} is no name for a handler: give name='...' in letters, digits, '_', '.' and '-'")
    if given.timeout is not None and (problem := _timeout_problem(given.timeout)):
        problems.append(problem)
    if given.retry is not None and (problem := _retry_problem(given.retry)):
        problems.append(problem)
    patterns = [p for name in given.names if (p := _pattern(name, service.catalogue, problems)) is not None]
    if not given.names:
        problems.append("no event is named: on('order_placed'), on(OrderPlaced) or on('#')")
    reads, takes_context = _signature(given, problems)
    if reads is None or problems:
        return None
    _check_names_against_annotation(given.names, patterns, reads, problems)
    _check_key(given.key, reads, problems)
    return Subscription(
        handler=handler,
        function=given.function,
        patterns=tuple(dict.fromkeys(patterns)),
        reads=reads,
        takes_context=takes_context,
        retry=given.retry or service.retry,
        timeout=given.timeout or service.timeout,
        key=given.key,
        where=given.where,
    )


def pattern_of(name: str) -> str:
    """The binding pattern of what `on` takes as a string: `order_placed.*` for `order_placed`.

    Raises:
        SetupError: *name* is no event's name, type or pattern.
    """
    problems: list[str] = []
    pattern = _pattern(name, None, problems)
    if pattern is None or problems:
        raise SetupError("\n".join(problems))
    return pattern


def _pattern(name: str | type[Event], catalogue: Catalogue | None, problems: list[str]) -> str | None:
    """The binding pattern of what `on` was given; None after a problem."""
    if isinstance(name, type) and issubclass(name, Event):
        if not hasattr(name, "event_type"):
            problems.append(f"{name.__name__} is no event of its own: subscribe to its subclasses")
            return None
        if catalogue is not None and catalogue.find(name.event_type) is not name:
            problems.append(f"{name.__name__} ({name.event_type}) is not in the service's catalogue: add it there")
        return name.event_type
    if not isinstance(name, str):
        problems.append(f"{name!r} is neither an event class nor a name")
        return None
    words = name.split(".")
    if len(name.encode()) > LONGEST_TYPE:
        problems.append(f"{name[:40]!r}... is longer than any event type, {LONGEST_TYPE} bytes")
        return None
    if not all(_WHOLE_WORD.fullmatch(word) for word in words):
        problems.append(_why_no_word(name))
        return None
    if "*" in words or "#" in words:
        if catalogue is not None and not any(matches(name, known) for known in catalogue.types):
            problems.append(f"the pattern {name!r} matches no event of the catalogue ({', '.join(catalogue.types)})")
        return name
    base, version = split_type(name)
    if catalogue is not None:
        known = catalogue.versions(base)
        if not known:
            guess = catalogue.suggest(base)
            hint = f": did you mean {guess!r}?" if guess else f" ({', '.join(catalogue.names)})"
            problems.append(f"no event {base!r} in the catalogue{hint}")
        elif version is not None and version not in known:
            versions = ", ".join(f"v{v}" for v in known)
            problems.append(
                f"no event {base!r} v{version} in the catalogue (known: {versions}): "
                "add it, or deploy the newer schemas"
            )
    elif not is_name(base) or _VERSION_WORD.fullmatch(words[-1] if version is None else words[-2]):
        problems.append(f"{name!r} is no event name: snake_case words joined by dots, for example 'order_placed'")
    return name if version is not None else f"{name}.*"


def _why_no_word(name: str) -> str:
    if "*" in name or "#" in name:
        return (
            f"{name!r}: a wildcard stands for whole words between dots ('payments.*', '#'); AMQP cannot match a part "
            "of a word, so list the names instead"
        )
    return f"{name!r} has an empty word or a space in it: snake_case words joined by dots"


def _signature(given: _Registration, problems: list[str]) -> tuple[Reads | None, bool]:
    function = given.function
    if not inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(_written(function)):
        problems.append("a handler is an `async def`; put blocking work into `await asyncio.to_thread(...)` inside it")
        return None, False
    try:
        everything = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(_written(function), localns=dict(given.namespace))
    except (NameError, TypeError, ValueError) as error:
        problems.append(
            f"its annotations cannot be read: {error}; import the names at module level, not for types only"
        )
        return None, False
    parameters = [p for p in everything if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not 1 <= len(parameters) <= 2 or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in everything):
        problems.append("a handler takes (event) or (event, context)")
        return None, False
    annotation = hints.get(parameters[0].name)
    reads = _reads(annotation)
    if reads is not None:
        problems += [
            f"{model.__name__} is not fully defined: import what its annotations name"
            for model in reads.models
            if model.model_rebuild(raise_errors=False) is False
        ]
    else:
        shown = "nothing" if annotation is None else repr(annotation)
        problems.append(
            f"its first parameter is annotated with {shown}: say an event class, a union of event classes, a pydantic "
            "model or Envelope"
        )
    return reads, len(parameters) == 2


def _reads(annotation: object) -> Reads | None:
    annotation = getattr(annotation, "__value__", annotation)  # `type OrderEvent = ...`
    if get_origin(annotation) in (typing.Union, types.UnionType):
        members = get_args(annotation)
    elif get_origin(annotation) is typing.Annotated:
        return _reads(get_args(annotation)[0])
    else:
        members = (annotation,)
    if members == (Envelope,):
        return Reads(envelope=True)
    classes = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    if len(classes) != len(members):
        return None
    events = {m.event_type: m for m in classes if issubclass(m, Event) and hasattr(m, "event_type")}
    if len(events) == len(members):
        return Reads(events=events)
    if len(classes) == 1 and not issubclass(classes[0], Event):
        return Reads(model=classes[0])
    return None


def _check_names_against_annotation(
    names: tuple[str | type[Event], ...], patterns: list[str], reads: Reads, problems: list[str]
) -> None:
    """A handler that could read nothing of what it asks for would dead-letter all of it."""
    if reads.events is None:
        return
    for name, pattern in zip(names, patterns, strict=True):
        if not any(matches(pattern, type_) for type_ in reads.events):
            shown = name if isinstance(name, str) else name.__name__
            problems.append(f"it subscribes to {shown!r} but its annotation reads only {reads}")
    for type_, model in reads.events.items():
        if not any(matches(pattern, type_) for pattern in patterns):
            problems.append(f"its annotation reads {model.__name__} ({type_}), which it does not subscribe to")


def _check_key(key: Key | None, reads: Reads, problems: list[str]) -> None:
    if key is None or callable(key):
        return
    if reads.envelope:
        problems.append("idempotency_key names a field, but the handler takes an Envelope: give a function of it")
        return
    fields = (key,) if isinstance(key, str) else key
    if not isinstance(fields, tuple) or not all(isinstance(field, str) for field in fields):
        problems.append(f"idempotency_key={key!r} is neither a field's name, a tuple of names nor a function")
        return
    if not fields:
        problems.append("idempotency_key=() names no field")
    problems += [
        f"idempotency_key names {field!r}, which {model.__name__} does not have"
        for model in reads.models
        for field in fields
        if field not in model.model_fields and callable(getattr(model, field, callable))
    ]
