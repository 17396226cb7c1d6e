"""Audit: every event, as it came, one line each."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent

from eventbus import Bus, Envelope, Worker
from eventbus.testing import context
from services.audit.handlers import service
from services.audit.log import line, resources
from services.settings import Settings
from tests.services.orders_of_every_kind import order
from tests.services.waiting import eventually


def log_of(settings: Settings) -> list[dict[str, Any]]:
    file = settings.data / "audit.jsonl"
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


def foreign(data: bytes, content_type: str = "application/json") -> Envelope:
    attributes = {"id": "1", "source": "/elsewhere", "type": "their.thing", "datacontenttype": content_type}
    return Envelope.from_cloudevent(CloudEvent({"specversion": "1.0", **attributes}, data))


async def test_every_event_is_written_down_known_or_not(settings: Settings) -> None:
    url = "memory://audit-writes-everything"
    placed = order()

    async def both_are_there() -> bool:
        return len(log_of(settings)) == 2

    async with (
        Worker(service.replace(lifespan=lambda _: resources(settings)), url=url),
        Bus(url, source="/services/orders") as bus,
    ):
        await bus.publish(placed, id="7", subject="ada")
        await bus.publish(foreign(b'{"a": 1}'))
        await eventually(both_are_there, "both events are in the log")

    ours, theirs = sorted(log_of(settings), key=lambda event: str(event["id"]), reverse=True)
    assert (ours["id"], ours["source"], ours["type"]) == ("7", "/services/orders", "order_placed.v1")
    assert (ours["specversion"], ours["subject"]) == ("1.0", "ada")
    assert ours["data"] == placed.model_dump(mode="json")
    assert (theirs["source"], theirs["type"], theirs["data"]) == ("/elsewhere", "their.thing", {"a": 1})


@pytest.mark.parametrize(
    ("data", "content_type"),
    [(b"\xff\x00", "application/octet-stream"), (b"{", "application/json"), (b"[1e999]", "application/json")],
)
def test_what_is_no_json_is_kept_byte_by_byte(data: bytes, content_type: str) -> None:
    written = json.loads(line(foreign(data, content_type)))

    assert base64.b64decode(written["data_base64"]) == data
    assert "data" not in written


async def test_lines_of_many_writers_never_mix(settings: Settings) -> None:
    async with resources(settings) as one, resources(settings) as other:
        envelopes = [context(order()).envelope for _ in range(50)]

        await asyncio.gather(*((one, other)[n % 2].append(envelope) for n, envelope in enumerate(envelopes)))

    assert {event["id"] for event in log_of(settings)} == {envelope.id for envelope in envelopes}


async def test_a_line_that_a_crash_cut_short_spoils_no_other(settings: Settings) -> None:
    (settings.data / "audit.jsonl").write_text('{"id": "cut sho')

    async with resources(settings) as log:
        await log.append(context(order()).envelope)

    lines = (settings.data / "audit.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["type"] == "order_placed.v1"
