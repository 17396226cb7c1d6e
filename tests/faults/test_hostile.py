"""Hostile messages: a short form of `make hostile` on every broker line, and properties of what reads them."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp.header import ContentHeader

from eventbus import Envelope, EnvelopeError, Retry, Service, Worker
from eventbus.dead_letters import DeadLetter, DeadLetters
from eventbus.envelope import decode
from eventbus.message import Message
from eventbus.transport.base import Publication, Unpublishable
from eventbus.transport.rabbitmq import channels
from tests import corpus
from tests.faults.hostile.__main__ import as_json
from tests.faults.hostile.amqp import Connection, Raw, decode_properties, encode_field, encode_properties, nested
from tests.faults.hostile.backlog import run_backlog
from tests.faults.hostile.count import count, digest_of, envelope_of, line_of
from tests.faults.hostile.messages import Generator
from tests.faults.hostile.run import run_hostile
from tests.rig import Rig, until
from tests.servers import BrokerServer
from tests.strategies import FIELDS, messages, raw_messages, read

MESSAGES = 1000
MOST_MB = 150.0
NOW = datetime(2030, 1, 31, 12, 0, tzinfo=UTC)


# ── through a live worker ───────────────────────────────────────────────────────────────────────────


async def test_every_hostile_message_is_handled_or_dead_lettered_as_it_was(every_line: BrokerServer) -> None:
    result = await run_hostile(every_line, messages=MESSAGES, seed=1, quiet_s=3.0)

    assert result.is_alive
    assert result.exit_code == 0
    for counted in result.counts:
        assert counted.adds_up, (counted, result.problems)
        assert counted.handled
        assert counted.dead
    assert result.counts[0].sent == MESSAGES
    assert json.loads(json.dumps(as_json(result)))["is_good"] == result.is_good
    assert result.end_mb < MOST_MB


async def test_memory_does_not_depend_on_what_waits(every_line: BrokerServer) -> None:
    result = await run_backlog(every_line, events=10_000, handled=300, little=300)

    assert [state.what for state in result.states] == ["little before it", "a backlog", "handlers hang"]
    assert result.is_good, result


async def test_what_no_client_can_read_is_one_dead_letter_and_its_neighbours_are_handled(
    every_line: BrokerServer,
) -> None:
    url = every_line.new_vhost()
    handled: set[str] = set()
    service = Service("shop", retry=Retry(attempts=1))

    @service.on("#")
    async def keep(envelope: Envelope) -> None:
        if envelope.subject == "fails":
            raise ValueError
        handled.add(envelope.id)

    unreadable = {
        "a key that is no text": event("key", key=b"order_placed.\xff\xfe"),
        "a name that is no text": event("name", ("\xff".encode("latin-1"), ("V", None))),
        "a time in the year 36 billion": event("time", (b"at", ("T", 2**60))),
        "tables in tables": event("deep", (b"deep", nested(10_000))),
        "tables that can just be read, and not be written": event("less deep", (b"deep", nested(470)), subject="fails"),
    }
    neighbours = [event(f"good {n}") for n in range(60)]

    async with Worker(service, url=url):
        with Connection(url) as connection:
            wire = [*neighbours[:20], *unreadable.values(), *neighbours[20:40], *unreadable.values(), *neighbours[40:]]
            await asyncio.to_thread(connection.publish, "events", iter(wire))
            await until(lambda: len(handled) == len(neighbours), "the neighbours are handled")
            await until(lambda: connection.count("events.shop.dead") >= 2 * len(unreadable), "the others are dead")
        letters = await dead_letters(url, "shop")
        with Connection(url) as connection:
            dead = Counter(digest_of(raw) for raw in connection.take_all("events.shop.dead"))

    assert dead == Counter({digest_of(raw): 2 for raw in unreadable.values()})
    assert len(letters) == 2 * len(unreadable)
    assert {letter.body for letter in letters} == {raw.body for raw in unreadable.values()}


def event(id: str, *headers: tuple[bytes, tuple[str, object]], key: bytes = b"a.v1", subject: str = "s") -> Raw:
    attributes = {"specversion": "1.0", "id": id, "source": "/x", "type": "a.v1", "subject": subject}
    said = [(f"cloudEvents_{name}".encode(), ("S", value.encode())) for name, value in attributes.items()]
    return Raw(key, encode_properties({"headers": [*said, *headers], "delivery_mode": 2}), id.encode())


async def dead_letters(url: str, service: str) -> list[DeadLetter]:
    async with DeadLetters(service, url=url) as dead:
        return [letter async for letter in dead]


# ── what reads them ─────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=200)
@given(messages)
def test_whatever_a_message_is_it_decodes_or_is_an_envelope_error(message: Message) -> None:
    read = decoded(message)

    if isinstance(read, EnvelopeError):
        assert read.reason == "invalid-envelope"
        assert "\n" not in str(read)
    else:
        assert read.id
        assert read.time.tzinfo is UTC


@settings(max_examples=150)
@given(raw_messages())
def test_what_is_published_again_has_the_headers_that_it_had_or_is_left_to_the_broker(raw: Raw) -> None:
    message = read(raw)
    if message is None:
        return
    try:
        encoded = channels.encode(Publication("x", "k", message.republished()), frame_max=131_072)
    except Unpublishable:
        return

    copy = Raw(raw.key, ContentHeader(properties=encoded.properties).marshal()[12:], encoded.body)

    assert digest_of(copy) in (digest_of(raw), digest_of(raw, as_read=True))


@settings(max_examples=25)
@given(st.lists(messages, min_size=1, max_size=10))
def test_on_the_embedded_broker_every_message_is_handled_or_a_dead_letter(given: list[Message]) -> None:
    async def run() -> tuple[list[Message], int, list[bytes], int]:
        service = Service("shop", retry=Retry(attempts=2))

        @service.on("#")
        async def keep(envelope: Envelope) -> None: ...

        async with Rig(service) as rig:
            taken = [message for message in given if await is_taken(rig, message)]
            await rig.settled()
            dead = [letter.body for letter in rig.dead_letters(service)]
            return taken, rig.attempts(keep), dead, rig.depth("events.shop") + rig.depth("events.shop.retry")

    taken, runs, dead, left = asyncio.run(run())

    read = [decoded(message) for message in taken]
    events = [envelope for envelope in read if isinstance(envelope, Envelope)]
    refused = [message.body for message, one in zip(taken, read, strict=True) if isinstance(one, EnvelopeError)]
    assert left == 0
    assert sorted(dead) == sorted(refused)
    assert runs == len({(event.source, event.id, re.sub(r"\.v\d+$", "", event.type)) for event in events})


async def is_taken(rig: Rig, message: Message) -> bool:
    """Whether the embedded broker takes *message*: no more than AMQP carries."""
    try:
        await rig.raw(message)
    except Unpublishable:
        return False
    return True


def decoded(message: Message) -> Envelope | EnvelopeError:
    try:
        return decode(message, now=lambda: NOW)
    except EnvelopeError as error:
        return error


# ── the corpus and the generator ────────────────────────────────────────────────────────────────────


def test_of_the_corpus_what_is_a_cloudevent_is_read_as_one() -> None:
    events = {name for name, raw in corpus.load().items() if envelope_of(raw) is not None}

    assert events == {
        "cloudevents-go-amqp-colon", "cloudevents-sdk-amqp-binary", "cloudevents-sdk-rabbitmq-binary",
        "cloudevents-sdk-structured", "dapr-pubsub", "eventbus", "knative-eventing",
    }  # fmt: skip


def test_a_seed_says_which_messages() -> None:
    once, again, another = (list(Generator(seed).messages(200)) for seed in (1, 1, 2))

    assert once == again != another


@given(FIELDS)
def test_a_field_is_read_as_it_was_written(field: tuple[str, object]) -> None:
    properties = encode_properties({"headers": [(b"a", field)]})

    assert decode_properties(properties)["headers"] == [(b"a", encode_field(field))]


# ── the count can fail ──────────────────────────────────────────────────────────────────────────────


GOOD, FAILS = event("good"), event("fails")


def counted(sent: list[Raw], *, dead: list[Raw], handled: list[Raw]) -> Iterator[int]:
    notes = {line_of("shop", envelope) for raw in handled if (envelope := envelope_of(raw)) is not None}
    reasons = {digest: Counter(exhausted=n) for digest, n in Counter(map(digest_of, dead)).items()}
    found = count("shop", [("kind", raw) for raw in sent], reasons, notes, 0)
    return iter((found.handled, found.dead, found.again, found.lost, found.changed, found.invented, found.adds_up))


def test_a_message_that_nobody_has_seen_is_lost() -> None:
    assert tuple(counted([GOOD, FAILS], dead=[FAILS], handled=[])) == (0, 1, 0, 1, 0, 0, False)


def test_a_changed_dead_letter_is_found_out() -> None:
    changed = replace(FAILS, body=FAILS.body + b" ")

    assert tuple(counted([GOOD, FAILS], dead=[changed], handled=[GOOD])) == (1, 0, 0, 1, 1, 0, False)


def test_an_event_that_was_handled_with_other_data_is_found_out() -> None:
    changed = replace(GOOD, body=b"other")

    assert tuple(counted([FAILS], dead=[FAILS], handled=[changed])) == (0, 1, 0, 0, 0, 1, False)


def test_a_second_dead_letter_for_one_message_is_counted() -> None:
    assert tuple(counted([GOOD, FAILS], dead=[FAILS, FAILS], handled=[GOOD])) == (1, 2, 1, 0, 0, 0, True)
