"""What a started worker leaves on the broker, what `eventbus topology show` says, and the documented table are one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any  # Any: JSON as rabbitmqctl prints it

import pytest

from tests.programs import eventbus, running
from tests.servers import BrokerServer, vhost_of

SERVICES = """
from eventbus import Envelope, Event, Service

class OrderPlaced(Event, name="order_placed", version=1):
    order: str

class PaymentCaptured(Event, name="payments.captured", version=2):
    order: str

shipping = Service("shipping")
payments = Service("payments")
audit = Service("audit")

@shipping.on("order_placed")
async def plan(event: OrderPlaced) -> None: ...

@shipping.on(PaymentCaptured)
async def ship(event: PaymentCaptured) -> None: ...

@payments.on("order_placed", "payments.*")
async def follow(envelope: Envelope) -> None: ...

@audit.on("#")
async def write_down(envelope: Envelope) -> None: ...
"""
PATTERNS = {
    "shipping": ["order_placed.*", "payments.captured.v2"],
    "payments": ["order_placed.*", "payments.*"],
    "audit": ["#"],
}
STARS = ".".join(["*"] * 24)

Rows = list[dict[str, Any]]


# ── the documented table, spelled out ───────────────────────────────────────────────────────────────


def documented_exchanges() -> Rows:
    topics = ["events", *(f"events.delay.v1.{level:02d}" for level in range(24))]
    alternate = {"alternate-exchange": "events.undeliverable"}
    return [
        *({"name": name, "type": "topic", "durable": True, "arguments": {}} for name in topics),
        {"name": "events.dead", "type": "topic", "durable": True, "arguments": alternate},
        {"name": "events.delay.v1.end", "type": "topic", "durable": True, "arguments": alternate},
        {"name": "events.undeliverable", "type": "fanout", "durable": True, "arguments": {}},
    ]


def documented_queues() -> Rows:
    rows = [quorum("events.undeliverable", 1_000_000_000)]
    for service in PATTERNS:
        to_dead = dead_lettering("events.dead") | {"x-dead-letter-routing-key": service}
        rows.append(quorum(f"events.{service}", 100, to_dead))
        rows.append(quorum(f"events.{service}.retry", 100, to_dead))
        rows.append(quorum(f"events.{service}.dead", 1_000_000_000, dead_lettering("events.undeliverable")))
    for level in range(24):
        below = f"events.delay.v1.{level - 1:02d}" if level else "events.delay.v1.end"
        waits = {"x-message-ttl": 250 * 2**level}
        rows.append(quorum(f"events.delay.v1.{level:02d}", 1_000_000_000, dead_lettering(below) | waits))
    return rows


def quorum(name: str, delivery_limit: int, more: dict[str, object] | None = None) -> dict[str, Any]:
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": delivery_limit} | (more or {})
    return {"name": name, "type": "quorum", "durable": True, "arguments": arguments}


def dead_lettering(exchange: str) -> dict[str, object]:
    return {
        "x-dead-letter-exchange": exchange,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def documented_bindings() -> Rows:
    rows = [binding("events.undeliverable", "events.undeliverable", "")]
    for service, patterns in PATTERNS.items():
        rows.append(binding("events.dead", f"events.{service}.dead", service))
        rows.append(binding("events.delay.v1.end", f"events.{service}.retry", f"{STARS}.retry.{service}"))
        for pattern in patterns:
            rows.append(binding("events", f"events.{service}", pattern))
            rows.append(binding("events.delay.v1.end", f"events.{service}", f"{STARS}.publish.{pattern}"))
    for level in range(24):
        here = f"events.delay.v1.{level:02d}"
        below = f"events.delay.v1.{level - 1:02d}" if level else "events.delay.v1.end"
        before = "*." * (23 - level)
        rows.append(binding(here, here, f"{before}1.#"))
        rows.append(binding(here, below, f"{before}0.#") | {"destination_type": "exchange"})
    return rows


def binding(source: str, destination: str, key: str) -> dict[str, Any]:
    return {"source": source, "destination": destination, "destination_type": "queue", "routing_key": key}


# ── what the broker says ────────────────────────────────────────────────────────────────────────────


def listed(broker: BrokerServer, url: str, *what: str) -> Rows:
    rows: Rows = json.loads(broker.ctl("--formatter", "json", what[0], "-p", vhost_of(url), *what[1:]))
    for row in rows:
        if isinstance(row["arguments"], list):
            row["arguments"] = {name: value for name, _, value in row["arguments"]}
    return rows


def on_the_broker(broker: BrokerServer, url: str) -> dict[str, Rows]:
    """All that is in the virtual host besides what every virtual host has."""
    exchanges = listed(broker, url, "list_exchanges", "name", "type", "durable", "arguments")
    bindings = listed(broker, url, "list_bindings")
    return {
        "exchanges": [row for row in exchanges if row["name"] and not row["name"].startswith("amq.")],
        "queues": listed(broker, url, "list_queues", "name", "type", "durable", "arguments"),
        "bindings": [
            binding(row["source_name"], row["destination_name"], row["routing_key"])
            | {"destination_type": row["destination_kind"]}
            for row in bindings
            if row["source_name"]  # the default exchange leads to every queue by its name
        ],
    }


def in_order(rows: Rows) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SERVICES)
    return tmp_path


# ── the tests ───────────────────────────────────────────────────────────────────────────────────────


def test_what_is_shown_is_what_is_documented(shop: Path) -> None:
    shown = eventbus("topology", "show", "shop", "--json", cwd=shop).json

    assert in_order(shown["exchanges"]) == in_order(documented_exchanges())
    assert in_order(shown["queues"]) == in_order(documented_queues())
    assert in_order(shown["bindings"]) == in_order(documented_bindings())


def test_what_is_shown_is_what_a_started_worker_leaves_on_the_broker(every_line: BrokerServer, shop: Path) -> None:
    url = every_line.new_vhost()
    with running("run", "shop", "--url", url, cwd=shop, wait_for="ready"):
        there = on_the_broker(every_line, url)

    shown = eventbus("topology", "show", "shop:audit", "shop:payments", "shop:shipping", "--json", cwd=shop).json
    for part in ("exchanges", "queues", "bindings"):
        assert in_order(there[part]) == in_order(shown[part]), part


def test_applied_and_started_are_the_same(broker: BrokerServer, shop: Path) -> None:
    applied, started = broker.new_vhost(), broker.new_vhost()

    done = eventbus("topology", "apply", "shop", "--url", applied, "--json", cwd=shop)
    with running("run", "shop", "--url", started, cwd=shop, wait_for="ready"):
        after_start = on_the_broker(broker, started)

    after_apply = on_the_broker(broker, applied)
    for part in ("exchanges", "queues", "bindings"):
        assert in_order(after_apply[part]) == in_order(after_start[part]) == in_order(done.json[part]), part


def test_another_namespace_shares_nothing_with_the_default_one(shop: Path) -> None:
    default = eventbus("topology", "show", "shop", "--json", cwd=shop).json
    other = eventbus("topology", "show", "shop", "--json", "--namespace", "staging", cwd=shop).json

    assert json.dumps(other).replace("staging", "events") == json.dumps(default)
    assert '"events' not in json.dumps(other)
