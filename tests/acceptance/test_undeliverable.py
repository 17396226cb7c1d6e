"""`eventbus undeliverable` on a real RabbitMQ: each way to get there, and back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any  # Any: JSON as the program prints it
from urllib.parse import quote

import pytest

from eventbus.delay import LEVELS
from tests.programs import DEADLINE_S, Done, eventbus, on_a_terminal, running
from tests.servers import BrokerServer, vhost_of

SHOP = """
from datetime import timedelta
from eventbus import Context, Event, Reject, RetryLater, Service

class Ordered(Event, name="ordered", version=1):
    order: str

mails = Service("mails")

@mails.on("ordered")
async def mail(event: Ordered, context: Context) -> None:
    print("mailing", event.order, context.attempt, flush=True)
    if event.order == "bad":
        raise Reject("we do not serve them")
    if event.order == "later" and context.attempt == 1:
        raise RetryLater(timedelta(seconds=12))  # its queue is deleted long before
"""
TAKE_ALL = {"count": 10, "ackmode": "ack_requeue_false", "encoding": "auto"}


class Shop:
    """The service `mails` on a virtual host of its own."""

    def __init__(self, broker: BrokerServer, cwd: Path) -> None:
        (cwd / "shop.py").write_text(SHOP)
        self.broker, self.cwd, self.url = broker, cwd, broker.new_vhost()
        self.vhost = quote(vhost_of(self.url), safe="")

    def __call__(self, *words: str) -> Done:
        return eventbus(*words, "--url", self.url, cwd=self.cwd)

    def apply(self) -> None:
        assert self("topology", "apply", "shop").code == 0

    def publish(self, order: str, *more: str) -> None:
        done = self("publish", "ordered.v1", f'{{"order": "{order}"}}', "--id", order, *more)
        assert done.code == 0, done.err

    def handles(self, *said: str) -> None:
        """Run its worker until it has said all of it."""
        with running("run", "shop", "--url", self.url, cwd=self.cwd, wait_for="ready") as worker:
            for text in said:
                worker.wait_for(text)
            worker.end()

    def api(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        return self.broker.api(method, path, body)

    def delete_queue(self, name: str) -> None:
        self.api("DELETE", f"/queues/{self.vhost}/{name}")

    def listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self("undeliverable", "list", "--json").json
        return found

    def one(self) -> dict[str, Any]:
        """The undeliverable message, once there is one."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := self.listed()):
            assert time.monotonic() < deadline
        (message,) = found
        return message

    def dead(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self("dead", "list", "mails", "--json").json
        return found


@pytest.fixture
def shop(every_line: BrokerServer, tmp_path: Path) -> Shop:
    return Shop(every_line, tmp_path)


def replayed(shop: Shop, *words: str) -> tuple[int, dict[str, int]]:
    done = shop("undeliverable", "replay", *(words or ("--all",)), "--yes", "--json")
    return done.code, done.json


def test_a_retry_whose_queue_is_gone_is_caught_and_goes_on_when_it_is_back(shop: Shop) -> None:
    with running("run", "shop", "--url", shop.url, cwd=shop.cwd, wait_for="ready") as worker:
        shop.publish("later")
        worker.wait_for("mailing later 1")
        worker.end()
    shop.delete_queue("events.mails.retry")

    message = shop.one()
    too_early = replayed(shop)
    shop.apply()
    in_time = replayed(shop, "--target", "mails")

    assert (message["event_id"], message["type"], message["why"]) == ("later", "ordered.v1", "no-retry-queue")
    assert message["target"] == "mails"
    assert message["reason"] == "a retry of mails was due, and its retry queue was missing or not bound"
    assert too_early == (3, {"replayed": 0, "left": 1})
    assert in_time == (0, {"replayed": 1, "left": 0})
    assert shop.listed() == []
    shop.handles("mailing later 2")


def test_a_delayed_event_without_a_subscriber_is_caught_and_reaches_one_that_comes_later(shop: Shop) -> None:
    shop.publish("one", "--delay", "300ms")

    message = shop.one()
    too_early = replayed(shop)
    shop.apply()
    in_time = replayed(shop, message["id"])

    assert (message["why"], message["target"]) == ("no-subscriber", "ordered.v1")
    assert too_early == (3, {"replayed": 0, "left": 1})
    assert in_time == (0, {"replayed": 1, "left": 0})
    assert shop.listed() == []
    shop.handles("mailing one 1")


def test_a_dead_letter_without_a_queue_is_caught_and_becomes_one(shop: Shop) -> None:
    with running("run", "shop", "--url", shop.url, cwd=shop.cwd, wait_for="ready") as worker:
        shop.delete_queue("events.mails.dead")
        shop.publish("bad")
        worker.wait_for("gave up (rejected)")
        worker.end()

    message = shop.one()
    too_early = replayed(shop)
    shop.apply()
    in_time = replayed(shop)

    assert (message["why"], message["target"]) == ("no-dead-queue", "mails")
    assert too_early == (3, {"replayed": 0, "left": 1})
    assert in_time == (0, {"replayed": 1, "left": 0})
    assert [(x["event_id"], x["reason"], x["error"]) for x in shop.dead()] == [
        ("bad", "rejected", "we do not serve them")
    ]


def test_what_goes_to_a_queue_that_is_there_but_not_bound_reaches_it(shop: Shop) -> None:
    shop.apply()
    bits = ".".join("0" * LEVELS)
    ways = {"retry": ("events.delay.v1.end", f"{bits}.retry.mails"), "dead": ("events.dead", "mails")}
    for kind, (exchange, key) in ways.items():
        bindings = f"/bindings/{shop.vhost}/e/{exchange}/q/events.mails.{kind}"
        (binding,) = shop.api("GET", bindings)
        shop.api("DELETE", f"{bindings}/{quote(binding['properties_key'], safe='')}")
        body = {"properties": {}, "routing_key": key, "payload": kind, "payload_encoding": "string"}
        shop.api("POST", f"/exchanges/{shop.vhost}/{exchange}/publish", body)

    caught = {message["why"] for message in shop.listed()}
    done = replayed(shop)

    assert caught == {"no-retry-queue", "no-dead-queue"}
    assert done == (0, {"replayed": 2, "left": 0})
    assert shop.listed() == []
    assert len(shop.dead()) == 1
    (again,) = shop.api("POST", f"/queues/{shop.vhost}/events.mails.retry/get", TAKE_ALL)
    assert again["payload"] == "retry"


def test_what_a_policy_took_from_the_dead_letters_can_be_put_back(shop: Shop) -> None:
    shop.apply()
    policy = f"/operator-policies/{shop.vhost}/limits"
    body = {"pattern": r"^events\.mails\.dead$", "definition": {"message-ttl": 1}, "apply-to": "queues"}
    shop.api("PUT", policy, body)
    with running("run", "shop", "--url", shop.url, cwd=shop.cwd, wait_for="ready") as worker:
        shop.publish("bad")
        worker.wait_for("gave up (rejected)")
        worker.end()

    message = shop.one()
    shop.api("DELETE", policy)
    done = replayed(shop)

    assert (message["why"], message["target"]) == ("taken-from-dead-letters", "mails")
    assert done == (0, {"replayed": 1, "left": 0})
    assert [(x["event_id"], x["reason"]) for x in shop.dead()] == [("bad", "rejected")]


def test_what_is_not_ours_is_shown_and_stays(shop: Shop) -> None:
    shop.apply()
    body = {
        "properties": {"headers": {"x": "y"}},
        "routing_key": "k",
        "payload": "who am I",
        "payload_encoding": "string",
    }
    shop.api("POST", f"/exchanges/{shop.vhost}/events.undeliverable/publish", body)

    message = shop.one()
    for_people = shop("undeliverable", "show", message["id"])
    for_scripts = shop("undeliverable", "show", message["id"], "--json").json
    table = shop("undeliverable", "list")
    done = replayed(shop)

    assert (message["why"], message["target"], message["type"]) == ("unknown", None, None)
    for fact in ("who am I", "x: y", "the bus did not put it there"):
        assert fact in for_people.out
    assert (for_scripts["body"], for_scripts["headers"]["x"]) == ("who am I", "y")
    assert message["id"] in table.out
    assert done == (3, {"replayed": 0, "left": 1})
    assert [left["id"] for left in shop.listed()] == [message["id"]]


def test_replaying_many_needs_a_yes_and_a_wrong_id_replays_none(shop: Shop) -> None:
    shop.publish("one", "--delay", "300ms")
    message = shop.one()
    shop.apply()
    words = ("undeliverable", "replay", "--all")

    in_a_script = shop(*words)
    wrong = shop("undeliverable", "replay", message["id"], "nosuchmessage")
    refused = on_a_terminal(*words, "--url", shop.url, cwd=shop.cwd, answers={"[y/N]": "n\n"})
    left = shop.listed()
    agreed = on_a_terminal(*words, "--url", shop.url, cwd=shop.cwd, answers={"[y/N]": "y\n"})

    assert in_a_script.code == 2
    assert "--yes" in in_a_script.error
    assert wrong.code == 1
    assert "nosuchmessage" in wrong.error
    assert (refused.code, [x["id"] for x in left]) == (0, [message["id"]])
    assert (agreed.code, shop.listed()) == (0, [])


def test_who_may_not_publish_to_queues_is_told_which_permission_is_missing(shop: Shop) -> None:
    shop.apply()
    shop.delete_queue("events.mails.dead")
    body = {"properties": {}, "routing_key": "mails", "payload": "given up", "payload_encoding": "string"}
    shop.api("POST", f"/exchanges/{shop.vhost}/events.dead/publish", body)
    shop.apply()
    poor = shop.broker.add_user(shop.url, write=r"^events")

    done = eventbus("undeliverable", "replay", "--all", "--yes", "--url", poor, cwd=shop.cwd)

    assert done.code == 1
    assert "access to exchange 'amq.default'" in done.err
    assert len(shop.listed()) == 1


def test_nothing_is_undeliverable_at_first(shop: Shop) -> None:
    shop.apply()

    done = shop("undeliverable", "list")

    assert (done.code, done.out) == (0, "nothing is undeliverable\n")
    assert shop("undeliverable", "show", "0123").error.startswith("there is no undeliverable message 0123")
