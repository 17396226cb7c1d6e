"""Who wants what: each form of a subscription, and each mistake, told with its place before anything is started."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Annotated, Any
from uuid import UUID

import pytest
from pydantic import BaseModel, Field, computed_field

from eventbus import Catalogue, Context, Envelope, EnvelopeError, Event, Retry, Service, SetupError, Worker
from eventbus.dispatch import Interest, UnknownVersion
from eventbus.envelope import enclose
from eventbus.service import RESERVED, Subscription, check_all, check_service_name, pattern_of


class Placed(Event, name="order_placed"):
    order_id: int
    note: str | None = None

    @computed_field  # type: ignore[prop-decorator]  # as pydantic's own documentation has it
    @property
    def day(self) -> str:
        return "monday"

    @property
    def broken(self) -> str:
        raise ValueError(f"order {self.order_id}")


class PlacedV2(Event, name="order_placed", version=2):
    order_id: int


class Captured(Event, name="payments.captured"):
    order_id: int


class Anything(BaseModel):
    order_id: int


CATALOGUE = Catalogue(Placed, PlacedV2, Captured)


def service(catalogue: Catalogue | None = None) -> Service:
    return Service("shop", catalogue=catalogue)


def only(of: Service) -> Subscription:
    (subscription,) = of.subscriptions()
    return subscription


def read(of: Service, envelope: Envelope) -> object:
    return Interest(of.name, only(of), envelope.type).read(envelope)


def key_of(of: Service, envelope: Envelope, event: Event) -> str:
    return Interest(of.name, only(of), envelope.type).idempotency_key(envelope, event)


def mistakes(of: Service) -> list[str]:
    """What it says after `file:line: service.handler: `."""
    with pytest.raises(SetupError) as raised:
        of.subscriptions()
    return [line.split(": ", 2)[-1] for line in str(raised.value).splitlines()]


def envelope_of(event: Event, *, id: str = "1", source: str = "/x", type: str | None = None) -> Envelope:
    envelope = enclose(event, id=id, source=source, time=datetime.now(UTC))
    return (
        envelope if type is None else Envelope(id=id, source=source, type=type, time=envelope.time, data=envelope.data)
    )


async def placed(event: Placed) -> None: ...
async def any_order(event: Anything) -> None: ...
async def envelope(envelope: Envelope) -> None: ...


# ── good forms ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (("order_placed",), ("order_placed.*",)),
        (("order_placed.v1",), ("order_placed.v1",)),
        ((Placed,), ("order_placed.v1",)),
        ((PlacedV2, "payments.captured"), ("order_placed.v2", "payments.captured.*")),
        (("#",), ("#",)),
        (("payments.#",), ("payments.#",)),
        (("*.v1",), ("*.v1",)),
        (("order_placed", "order_placed"), ("order_placed.*",)),
    ],
)
@pytest.mark.parametrize("catalogue", [None, CATALOGUE])
def test_what_is_subscribed_to_becomes_binding_patterns(
    names: tuple[Any, ...], patterns: tuple[str, ...], catalogue: Catalogue | None
) -> None:
    shop = service(catalogue)
    shop.on(*names)(envelope)

    assert only(shop).patterns == patterns


@pytest.mark.parametrize(
    ("wanted", "matching", "other"),
    [
        ("order_placed", ["order_placed.v1", "order_placed.v27"], ["order_placed", "order_placed_twice.v1"]),
        ("order_placed.v1", ["order_placed.v1"], ["order_placed.v2", "order_placed.v11"]),
        (Placed, ["order_placed.v1"], ["order_placed.v2"]),
        ("payments.#", ["payments.captured.v1", "payments"], ["order_placed.v1"]),
        ("#", ["order_placed.v1", "com.example.Thing"], []),
    ],
)
def test_a_subscription_wants_what_its_patterns_match(wanted: Any, matching: list[str], other: list[str]) -> None:
    shop = service()
    shop.on(wanted)(envelope)
    subscription = only(shop)

    assert [t for t in matching if not subscription.wants(t)] == []
    assert [t for t in other if subscription.wants(t)] == []


def test_an_event_class_reads_its_own_version() -> None:
    shop = service()
    shop.on("order_placed")(placed)

    assert read(shop, envelope_of(Placed(order_id=7))) == Placed(order_id=7)
    with pytest.raises(UnknownVersion, match=r"handler 'placed' reads order_placed.v1, not order_placed.v2"):
        read(shop, envelope_of(PlacedV2(order_id=7)))


def test_a_union_reads_one_version_each() -> None:
    shop = service()

    @shop.on("order_placed", "payments.captured")
    async def several(event: Placed | PlacedV2 | Captured) -> None: ...

    for event in (Placed(order_id=1), PlacedV2(order_id=2), Captured(order_id=3)):
        assert read(shop, envelope_of(event)) == event
    with pytest.raises(UnknownVersion):
        read(shop, envelope_of(Placed(order_id=1), type="order_placed.v3"))


def test_a_plain_model_reads_whatever_comes() -> None:
    shop = service()
    shop.on("#")(any_order)

    assert read(shop, envelope_of(Captured(order_id=3), type="com.example.Thing")) == Anything(order_id=3)
    with pytest.raises(EnvelopeError) as raised:
        read(shop, Envelope(id="1", source="/x", type="y", time=datetime.now(UTC), data=b"{}"))
    assert raised.value.reason == "invalid-data"


def test_an_envelope_is_everything_undecoded() -> None:
    shop = service()
    shop.on("#")(envelope)
    garbage = Envelope(id="1", source="/x", type="y", time=datetime.now(UTC), data=b"\xff")

    assert read(shop, garbage) is garbage


def test_an_annotated_or_named_union_is_that_union() -> None:
    shop = service()
    either = Placed | PlacedV2

    @shop.on("order_placed")
    async def named(event: either) -> None: ...

    @shop.on("order_placed")
    async def annotated(event: Annotated[Placed | PlacedV2, Field(description="x")]) -> None: ...

    assert [set(s.reads.models) for s in shop.subscriptions()] == [{Placed, PlacedV2}] * 2


@pytest.mark.parametrize("takes_context", [False, True])
def test_a_handler_takes_the_event_or_the_event_and_its_context(takes_context: bool) -> None:
    shop = service()
    if takes_context:

        @shop.on("order_placed")
        async def handler(event: Placed, context: Context) -> None: ...
    else:
        shop.on("order_placed")(placed)

    assert only(shop).takes_context is takes_context


def test_on_returns_the_function_unchanged() -> None:
    async def handler(event: Placed) -> None: ...

    before = dict(vars(handler))

    assert service().on("order_placed")(handler) is handler
    assert vars(handler) == before


def test_a_local_class_is_found_although_annotations_are_strings() -> None:
    class Shipped(Event):
        order_id: int

    shop = service()

    @shop.on(Shipped)
    async def ship(event: Shipped) -> None: ...

    assert isinstance(ship.__annotations__["event"], str)
    assert only(shop).reads.models == (Shipped,)


def test_the_names_of_another_module_that_wires_a_handler_are_not_the_handlers_own() -> None:
    shop = service()
    wiring = {"placed": placed, "shop": shop, "Placed": PlacedV2}  # its `Placed` is another one

    exec("def wire():\n    Placed = None\n    shop.on('order_placed')(placed)\nwire()", wiring)

    assert only(shop).reads.models == (Placed,)


class Mailer:
    async def __call__(self, event: Placed) -> None: ...

    async def mail(self, event: Placed, context: Context) -> None: ...


async def with_smtp(smtp: str, event: Placed, *, retries: int = 3) -> None: ...


@pytest.mark.parametrize(
    ("function", "takes_context"),
    [
        (Mailer(), False),
        (Mailer().mail, True),
        (functools.partial(with_smtp, "localhost"), False),
        (functools.partial(functools.partial(with_smtp, "localhost"), retries=1), False),
        (functools.partial(Mailer().mail), True),
    ],
    ids=["callable object", "bound method", "partial", "partial of partial", "partial of method"],
)
def test_anything_that_is_called_and_awaited_can_handle(function: Callable[..., Any], takes_context: bool) -> None:
    shop = service()
    shop.on("order_placed", name="mail")(function)

    subscription = only(shop)

    assert subscription.handler == "mail"
    assert subscription.reads.models == (Placed,)
    assert subscription.takes_context is takes_context
    arguments = (Placed(order_id=1), None) if takes_context else (Placed(order_id=1),)
    coroutine = subscription.function(*arguments)
    assert inspect.iscoroutine(coroutine)
    coroutine.close()


def test_a_bound_method_is_known_by_its_own_name() -> None:
    shop = service()
    shop.on("order_placed")(Mailer().mail)

    assert only(shop).handler == "mail"


def test_policies_are_the_handlers_own_or_the_services() -> None:
    shop = Service("shop", retry=Retry(attempts=2), timeout=timedelta(seconds=5))
    shop.on("order_placed", name="a")(placed)
    shop.on("order_placed", name="b", retry=Retry(attempts=7), timeout=timedelta(minutes=1))(placed)

    a, b = shop.subscriptions()

    assert (a.retry.attempts, a.timeout) == (2, timedelta(seconds=5))
    assert (b.retry.attempts, b.timeout) == (7, timedelta(minutes=1))


def test_the_source_is_made_of_the_name_or_given() -> None:
    assert Service("shop").source == "/services/shop"
    assert Service("shop", source="/eu/shop").source == "/eu/shop"


@pytest.mark.parametrize(
    ("name", "pattern"), [("order_placed", "order_placed.*"), ("order_placed.v2", "order_placed.v2"), ("#", "#")]
)
def test_the_pattern_of_a_name(name: str, pattern: str) -> None:
    assert pattern_of(name) == pattern


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def plain(event: Placed) -> None: ...
async def no_parameters() -> None: ...
async def three(event: Placed, context: Context, session: object) -> None: ...
async def keyword_only(event: Placed, context: Context | None = None, *, session: object) -> None: ...
async def without_annotation(event) -> None: ...  # type: ignore[no-untyped-def]  # the mistake
async def wrong_annotation(event: int) -> None: ...
async def with_none(event: Placed | None) -> None: ...
async def envelope_or_event(event: Envelope | Placed) -> None: ...
async def two_models(event: Anything | Placed) -> None: ...
async def base_class(event: Event) -> None: ...
async def unknown_name(event: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821  # the mistake
async def generator(event: Placed) -> AsyncIterator[None]:
    yield


class Unfinished(BaseModel):
    other: NotThere  # type: ignore[name-defined]  # noqa: F821  # the mistake


async def unfinished(event: Unfinished) -> None: ...


SHAPES: list[tuple[Callable[..., Any], str]] = [
    (plain, "a handler is an `async def`; put blocking work into `await asyncio.to_thread(...)` inside it"),
    (generator, "a handler is an `async def`"),
    (Placed, "a handler is an `async def`"),
    (no_parameters, "a handler takes (event) or (event, context)"),
    (three, "a handler takes (event) or (event, context)"),
    (keyword_only, "a handler takes (event) or (event, context)"),
    (without_annotation, "its first parameter is annotated with nothing: say an event class"),
    (wrong_annotation, "its first parameter is annotated with <class 'int'>: say an event class"),
    (with_none, "its first parameter is annotated with"),
    (envelope_or_event, "its first parameter is annotated with"),
    (two_models, "its first parameter is annotated with"),
    (base_class, "its first parameter is annotated with"),
    (unknown_name, "its annotations cannot be read: name 'Missing' is not defined; import the names at module level"),
    (unfinished, "Unfinished is not fully defined: import what its annotations name"),
]


@pytest.mark.parametrize(("function", "problem"), SHAPES, ids=[f.__name__ for f, _ in SHAPES])
def test_a_function_that_cannot_handle_is_told_why(function: Callable[..., Any], problem: str) -> None:
    shop = service()
    shop.on("order_placed")(function)

    (told,) = mistakes(shop)

    assert told.startswith(problem)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ((), "no event is named: on('order_placed'), on(OrderPlaced) or on('#')"),
        (("order_*",), "'order_*': a wildcard stands for whole words between dots"),
        (("pay#",), "'pay#': a wildcard stands for whole words"),
        (("order..placed",), "'order..placed' has an empty word or a space in it"),
        (("",), "'' has an empty word"),
        (("order placed",), "'order placed' has an empty word or a space in it"),
        (("OrderPlaced",), "'OrderPlaced' is no event name: snake_case words"),
        (("order_placed.v0",), "'order_placed.v0' is no event name"),
        (("order_placed.v01",), "'order_placed.v01' is no event name"),
        (("order_placed.v1.v2",), "'order_placed.v1.v2' is no event name"),
        (("a" * 191,), "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'... is longer than any event type, 190 bytes"),
        ((7,), "7 is neither an event class nor a name"),
        ((Anything,), "<class 'tests.unit.test_service.Anything'> is neither"),
        ((Event,), "Event is no event of its own: subscribe to its subclasses"),
    ],
)
def test_a_name_that_is_none_is_told_why(names: tuple[Any, ...], problem: str) -> None:
    shop = service()
    shop.on(*names)(envelope)

    (told,) = mistakes(shop)

    assert told.replace(__name__, "tests.unit.test_service").startswith(problem)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("order_plced", "no event 'order_plced' in the catalogue: did you mean 'order_placed'?"),
        ("zzz", "no event 'zzz' in the catalogue (order_placed, payments.captured)"),
        ("order_placed.v3", "no event 'order_placed' v3 in the catalogue (known: v1, v2): add it, or deploy the newer"),
        ("shipping.#", "the pattern 'shipping.#' matches no event of the catalogue (order_placed.v1, order_placed.v2"),
    ],
)
def test_a_name_that_the_catalogue_does_not_have_is_told_what_it_has(name: str, problem: str) -> None:
    shop = service(CATALOGUE)
    shop.on(name)(envelope)

    (told,) = mistakes(shop)

    assert told.startswith(problem)


def test_a_class_that_the_catalogue_does_not_have_is_told() -> None:
    class Stray(Event):
        pass

    shop = service(CATALOGUE)
    shop.on(Stray)(envelope)

    assert mistakes(shop) == ["Stray (stray.v1) is not in the service's catalogue: add it there"]


def test_a_handler_that_could_read_nothing_of_what_it_asks_for_is_told() -> None:
    shop = service()

    @shop.on("payments.captured", "order_placed")
    async def wrong(event: Placed) -> None: ...

    assert mistakes(shop) == ["it subscribes to 'payments.captured' but its annotation reads only order_placed.v1"]


def test_an_annotation_that_is_never_asked_for_is_told() -> None:
    shop = service()

    @shop.on(Placed)
    async def both(event: Placed | Captured) -> None: ...

    assert mistakes(shop) == ["its annotation reads Captured (payments.captured.v1), which it does not subscribe to"]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("orderid", "idempotency_key names 'orderid', which Placed does not have"),
        (("order_id", "nope"), "idempotency_key names 'nope', which Placed does not have"),
        ("model_dump", "idempotency_key names 'model_dump', which Placed does not have"),
        ((), "idempotency_key=() names no field"),
        (["order_id"], "idempotency_key=['order_id'] is neither a field's name, a tuple of names nor a function"),
        (5, "idempotency_key=5 is neither"),
    ],
)
def test_a_key_that_names_nothing_is_told(key: Any, problem: str) -> None:
    shop = service()
    shop.on("order_placed", idempotency_key=key)(placed)

    (told,) = mistakes(shop)

    assert told.startswith(problem)


def test_a_field_of_an_envelope_is_no_key() -> None:
    shop = service()
    shop.on("#", idempotency_key="id")(envelope)

    assert mistakes(shop) == ["idempotency_key names a field, but the handler takes an Envelope: give a function of it"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"timeout": 5}, "timeout=5 is no timedelta: say timeout=timedelta(seconds=...)"),
        ({"timeout": timedelta(0)}, "timeout=0:00:00 must be longer than zero"),
        ({"timeout": timedelta(minutes=26)}, "timeout=0:26:00 is over 0:25:00: brokers up to 4.2 close the channel"),
        ({"retry": 5}, "retry=5 is no Retry: say retry=Retry(attempts=...)"),
    ],
)
def test_a_policy_that_cannot_be_is_told_for_a_handler_and_for_a_service(options: dict[str, Any], problem: str) -> None:
    shop = service()
    shop.on("order_placed", **options)(placed)

    (told,) = mistakes(shop)
    assert told.startswith(problem)

    with pytest.raises(SetupError) as raised:
        Service("shop", **options)
    assert str(raised.value).startswith(f"service 'shop': {problem}")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prefetch": 0}, "prefetch=0 must be between 1 and 65535"),
        ({"prefetch": 65_536}, "prefetch=65536 must be between 1 and 65535"),
        ({"prefetch": "10"}, "prefetch='10' must be between 1 and 65535"),
        ({"concurrency": 0}, "concurrency=0 must be at least 1"),
        ({"concurrency": 1.5}, "concurrency=1.5 must be at least 1"),
        ({"source": "has space"}, "source='has space' cannot be"),
        ({"source": ""}, "source='' cannot be"),
    ],
)
def test_a_service_with_a_value_that_cannot_be_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(SetupError) as raised:
        Service("shop", **options)

    assert problem in str(raised.value)


async def forgotten_decorator(service: Service[Any]) -> AsyncIterator[int]:
    yield 1


async def no_context_manager(service: Service[Any]) -> int:
    return 1


@pytest.mark.parametrize("lifespan", [forgotten_decorator, no_context_manager, 5])
def test_a_lifespan_that_is_no_context_manager_is_told_with_the_other_mistakes(lifespan: Any) -> None:
    shop = Service("shop", lifespan=lifespan)
    shop.on("order_*")(envelope)

    _, mistakes = shop.check()

    assert "order_*" in mistakes[0]
    assert mistakes[1].startswith("service 'shop': lifespan=")
    assert "@contextlib.asynccontextmanager" in mistakes[1]
    assert callable(lifespan) == (f"{__file__}:" in mistakes[1])


@pytest.mark.parametrize("name", ["Shop", "", "dead", "delay", "due", "undeliverable", "a.b", 5, None])
def test_a_service_name_that_cannot_be_is_refused(name: Any) -> None:
    with pytest.raises(SetupError, match="service name"):
        Service(name)


def test_two_handlers_of_one_name_are_told_even_if_the_first_is_broken() -> None:
    shop = service()
    shop.on("order_placed", name="a")(plain)  # type: ignore[type-var]  # the mistake
    shop.on("order_placed", name="a")(placed)

    assert mistakes(shop)[1] == "a second handler called 'a': give one of them name=..."


@pytest.mark.parametrize("name", ["two words", "1st", "x" * 101, "a/b", "é"])
def test_a_handlers_name_is_an_identifier_that_travels(name: str) -> None:
    shop = service()
    shop.on("order_placed", name=name)(placed)

    (told,) = mistakes(shop)

    assert told.startswith(f"{name!r} is no name for a handler: give name='...'")


def test_a_handler_without_a_name_of_its_own_must_be_given_one() -> None:
    shop = service()
    shop.on("order_placed")(functools.partial(with_smtp, "localhost"))

    (told,) = mistakes(shop)

    assert "is no name for a handler: give name='...'" in told


def test_a_mistake_is_told_with_its_file_and_line() -> None:
    shop = service()

    @shop.on("order_*")
    async def where(event: Placed) -> None: ...

    with pytest.raises(SetupError) as raised:
        shop.subscriptions()
    place = f"{__file__}:{where.__code__.co_firstlineno}: shop.where: "
    assert str(raised.value).startswith(place)
    source = inspect.getsource(inspect.getmodule(where) or pytest).splitlines()
    assert source[where.__code__.co_firstlineno - 1].strip() == '@shop.on("order_*")'


def test_a_service_that_subscribes_to_nothing_is_told() -> None:
    with pytest.raises(SetupError, match=r"service 'shop' subscribes to nothing: decorate a handler with @shop.on"):
        service().subscriptions()


async def test_all_mistakes_of_all_services_are_told_at_once_and_nothing_is_started() -> None:
    entered: list[str] = []

    @asynccontextmanager
    async def lifespan(of: Service) -> AsyncIterator[None]:
        entered.append(of.name)
        yield

    good = Service("good", lifespan=lifespan)
    good.on("order_placed")(placed)
    bad = Service("bad", lifespan=lifespan)
    bad.on("order_*")(placed)
    bad.on("order_placed", name="second", idempotency_key="nope")(placed)
    worse = Service("worse", lifespan=lifespan)
    worse.on("order_placed")(plain)  # type: ignore[type-var]  # the mistake

    with pytest.raises(SetupError) as raised:
        # An address at which nobody listens: it is never called.
        await Worker(good, bad, good, worse, url="amqp://nobody@127.0.0.1:1/").__aenter__()

    lines = str(raised.value).splitlines()
    assert [(".placed: " in line, ".second: " in line, ".plain: " in line) for line in lines] == [
        (True, False, False),
        (False, True, False),
        (False, False, False),
        (False, False, True),
    ]
    assert lines[2] == "two services are called 'good': they would share a queue and split its events"
    assert entered == []


def test_to_run_no_service_is_a_mistake() -> None:
    with pytest.raises(SetupError, match="no service to run: give at least one"):
        check_all(())


# ── idempotency keys ────────────────────────────────────────────────────────────────────────────────────────────────


def key(event: Event, *, of: str = "shop", handler: str = "h", envelope: Envelope | None = None, **options: Any) -> str:
    shop = Service(of)

    @shop.on("#", name=handler, **options)
    async def handle(event: Anything) -> None: ...

    return key_of(shop, envelope or envelope_of(event), event)


ORDER = Placed(order_id=7)


def test_by_default_an_event_is_known_by_its_source_and_id() -> None:
    assert key(ORDER, envelope=envelope_of(ORDER, id="1")) == key(
        Placed(order_id=8), envelope=envelope_of(Placed(order_id=8), id="1")
    )
    assert key(ORDER, envelope=envelope_of(ORDER, id="1")) != key(ORDER, envelope=envelope_of(ORDER, id="2"))
    assert key(ORDER, envelope=envelope_of(ORDER, source="/a")) != key(ORDER, envelope=envelope_of(ORDER, source="/b"))


@pytest.mark.parametrize("by", ["order_id", ("order_id",), lambda event: str(event.order_id)])
def test_a_field_fields_or_a_function_tell_one_piece_of_work_from_another(by: Any) -> None:
    first, again = envelope_of(ORDER, id="1"), envelope_of(ORDER, id="2")

    assert key(ORDER, envelope=first, idempotency_key=by) == key(ORDER, envelope=again, idempotency_key=by)
    assert key(ORDER, idempotency_key=by) != key(Placed(order_id=8), idempotency_key=by)


def test_a_key_is_scoped_by_service_handler_and_event_name_but_not_by_version() -> None:
    by: dict[str, Any] = {"idempotency_key": "order_id"}
    keys = {
        key(ORDER, **by),
        key(ORDER, of="other", **by),
        key(ORDER, handler="other", **by),
        key(Captured(order_id=7), **by),
    }

    assert len(keys) == 4
    assert key(PlacedV2(order_id=7), **by) == key(ORDER, **by)


def test_the_fields_of_a_tuple_do_not_run_together() -> None:
    class Pair(Event):
        a: str
        b: str

    class Both(BaseModel):
        a: str
        b: str

    shop = service()

    @shop.on("#", idempotency_key=("a", "b"))
    async def handle(event: Both) -> None: ...

    def of(pair: Pair) -> str:
        return key_of(shop, envelope_of(pair), pair)

    assert of(Pair(a="x, y", b="z")) != of(Pair(a="x", b="y, z"))
    assert of(Pair(a='x"', b="z")) != of(Pair(a="x", b='"z'))


def test_names_with_slashes_do_not_run_into_the_value() -> None:
    def of(type: str, value: str) -> str:
        return key(ORDER, envelope=envelope_of(ORDER, type=type), idempotency_key=lambda _: value)

    assert of("a/b", "c") != of("a", "b/c")
    assert of("a%2Fb", "c") != of("a/b", "c")


class Status(str, Enum):  # noqa: UP042  # what older programs have
    NEW = "new"


def test_a_function_s_text_is_written_as_a_format_writes_it() -> None:
    """Keys that were stored by an earlier version are found again, and what `str` makes of an Enum is not its value."""
    assert key(ORDER, idempotency_key=lambda _: Status.NEW) == f"shop/h/order_placed/{Status.NEW}"


def test_a_computed_field_is_a_key() -> None:
    shop = service()
    shop.on("order_placed", idempotency_key=("order_id", "day"))(placed)

    assert key_of(shop, envelope_of(ORDER), ORDER).endswith(json.dumps(["7", "monday"]))


def raising(event: Placed) -> str:
    raise ValueError(f"order {event.order_id}")


@pytest.mark.parametrize(
    ("by", "problem"),
    [
        ("note", "the event's 'note', its idempotency key, is None"),  # or else all would be duplicates of the first
        (("order_id", "note"), "the event's 'note', its idempotency key, is None"),
        ("broken", "the event's 'broken', its idempotency key, raised ValueError"),
        (raising, "its idempotency key raised ValueError"),
        (lambda event: event.order_id, "its idempotency key is of type int: return a str"),
        (lambda event: None, "its idempotency key is of type NoneType: return a str"),
    ],
)
def test_an_event_without_its_key_is_invalid_data_told_without_the_data(by: Any, problem: str) -> None:
    shop = service()
    shop.on("order_placed", idempotency_key=by)(placed)

    with pytest.raises(EnvelopeError) as raised:
        key_of(shop, envelope_of(ORDER), ORDER)

    assert raised.value.reason == "invalid-data"
    assert str(raised.value) == problem
    assert raised.value.__context__ is None or raised.value.__suppress_context__


# ── another lifespan ────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def real(_: Service[Any]) -> AsyncIterator[UUID]:
    raise AssertionError("not in a test")
    yield


@asynccontextmanager
async def fake(_: Service[Any]) -> AsyncIterator[UUID]:
    yield UUID(int=0)


def test_replace_gives_the_same_handlers_other_resources() -> None:
    shop = Service("shop", lifespan=real, catalogue=CATALOGUE, concurrency=7)
    shop.on("order_placed")(placed)

    other = shop.replace(lifespan=fake)

    assert (other.name, other.concurrency, other.catalogue) == ("shop", 7, CATALOGUE)
    assert other.subscriptions() == shop.subscriptions()
    assert (other.lifespan, shop.lifespan) == (fake, real)


def test_a_handler_that_is_added_to_the_replaced_service_is_not_the_originals() -> None:
    shop = Service("shop", lifespan=real)
    shop.on("order_placed")(placed)

    other = shop.replace(lifespan=fake)
    other.on("order_placed", name="spy")(placed)

    assert [s.handler for s in shop.subscriptions()] == ["placed"]
    assert [s.handler for s in other.subscriptions()] == ["placed", "spy"]


# ── a service's name ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["a", "mail", "order-desk", "stock_2", "a" * 100])
def test_a_good_service_name(name: str) -> None:
    check_service_name(name)


@pytest.mark.parametrize(
    "name", ["", "Mail", "2mail", "_mail", "-mail", "mail.retry", "ma il", "mäil", "mail\n", "a" * 101]
)
def test_a_bad_service_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(SetupError, match="is no service name: use lower-case letters"):
        check_service_name(name)


@pytest.mark.parametrize("name", ["dead", "delay", "due", "undeliverable"])
def test_the_names_of_the_bus_itself_are_taken(name: str) -> None:
    assert name in RESERVED
    with pytest.raises(SetupError, match=f"'{name}' is taken by the bus itself"):
        Service(name)
