"""`eventbus topology verify`, `apply --prune` and `remove` on a real RabbitMQ that is not as it should be."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any  # Any: JSON as the program and the broker print it
from urllib.parse import quote

import pytest

from tests.programs import DEADLINE_S, Done, eventbus, on_a_terminal, running
from tests.servers import BrokerServer, vhost_of, with_login

SHOP = """
from datetime import timedelta
from pathlib import Path
from eventbus import Event, Reject, Retry, RetryLater, Service

class Ordered(Event, name="ordered", version=1):
    order: str

class Cancelled(Event, name="cancelled", version=1):
    order: str

mails = Service("mails", retry=Retry(attempts=9))
audit = Service("audit")

@mails.on("ordered")
async def mail(event: Ordered) -> None:
    print("mailing", event.order, flush=True)
    if event.order == "bad":
        raise Reject("no")
    if event.order == "later":
        raise RetryLater(timedelta(seconds=4))
    if event.order == "much later":
        raise RetryLater(timedelta(hours=5))

@audit.on("ordered")
async def note(event: Ordered) -> None: ...
"""
OLD_SUBSCRIPTION = """
@mails.on("cancelled")
async def regret(event: Cancelled) -> None: ...
"""

Findings = list[dict[str, str]]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


class Shop:
    """The service `mails` on a virtual host of its own."""

    def __init__(self, broker: BrokerServer, cwd: Path) -> None:
        self.broker, self.cwd, self.url = broker, cwd, broker.new_vhost()
        self.vhost = quote(vhost_of(self.url), safe="")
        self.here = ("--url", self.url, "--management", broker.management_url)

    def topology(self, *words: str) -> Done:
        return eventbus("topology", *words, *self.here, cwd=self.cwd)

    def apply(self, *words: str) -> Done:
        done = self.topology("apply", "shop:mails", *words)
        assert done.code == 0, done.err
        return done

    def verify(self) -> tuple[int, Findings]:
        done = self.topology("verify", "shop:mails", "--json")
        assert done.err == ""
        return done.code, done.json["findings"]

    def until(self, is_so: Callable[[Findings], object]) -> tuple[int, Findings]:
        """Verify until it finds what *is_so* wants: policies are told ten seconds late by some lines."""
        deadline = time.monotonic() + DEADLINE_S
        while not is_so((found := self.verify())[1]):
            assert time.monotonic() < deadline, found
            time.sleep(0.5)  # a look is a program of half a second's work, which the broker needs too
        return found

    def api(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        return self.broker.api(method, path.replace("VHOST", self.vhost), body)

    def delete_queue(self, name: str) -> None:
        self.api("DELETE", f"/queues/VHOST/{name}")

    def declare(self, name: str, **arguments: object) -> None:
        self.api("PUT", f"/queues/VHOST/{name}", {"durable": True, "arguments": arguments})

    def queues(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.api("GET", "/queues/VHOST")}

    def keys_of(self, queue: str) -> list[str]:
        rows = self.api("GET", f"/queues/VHOST/{queue}/bindings")
        return sorted(row["routing_key"] for row in rows if row["source"] == "events")

    def publish(self, order: str) -> None:
        done = eventbus("publish", "ordered.v1", f'{{"order": "{order}"}}', "--url", self.url, cwd=self.cwd)
        assert done.code == 0, done.err


def checks(findings: Findings, severity: str) -> set[tuple[str, str]]:
    return {(f["check"], f["where"]) for f in findings if f["severity"] == severity}


# ── verify ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_service_at_work_is_as_it_should_be(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    with running("run", "shop:mails", "--url", mails.url, cwd=shop, wait_for="ready"):
        code, findings = mails.verify()
        for_people = mails.topology("verify", "shop:mails")

    assert code == for_people.code == 0
    # What remains is said of the version, and is true of every service on it.
    assert {f["check"] for f in findings} <= {"version", "feature-flag"}
    assert f"RabbitMQ {every_line.version}: " in for_people.out.splitlines()[-1]


def test_a_service_that_is_not_at_work_is_a_warning(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    mails.publish("one")

    code, findings = mails.verify()

    assert code == 0
    own = {(check, where) for check, where in checks(findings, "warning") if check != "version"}
    assert own == {("no-consumer", "queue events.mails"), ("no-consumer", "queue events.mails.retry")}
    assert any("1 message waits in it" in finding["what"] for finding in findings)


def test_where_nothing_was_declared_everything_is_missing(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)

    code, findings = mails.verify()

    assert code == 3
    errors = checks(findings, "error")
    for kind in ("exchange events", "exchange events.delay.v1.23", "queue events.mails", "queue events.mails.dead"):
        assert kind in {where for _, where in errors}
    assert {check for check, _ in errors} == {"missing", "dead-letter-target"}


def test_deleted_queues_are_errors(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    mails.delete_queue("events.mails.dead")
    mails.delete_queue("events.mails.retry")

    code, findings = mails.verify()

    assert code == 3
    assert checks(findings, "error") == {
        ("dead-letter-target", "queue events.mails.dead"),
        ("missing", "queue events.mails.retry"),
    }


def test_queues_of_another_type_or_with_other_arguments_are_errors(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.declare("events.mails", **{"x-queue-type": "classic"})
    mails.declare("events.mails.retry", **{"x-queue-type": "quorum", "x-delivery-limit": 5})
    assert mails.topology("apply", "shop:mails").code == 1  # a conflict; what is shared is there by now

    code, findings = mails.verify()

    assert code == 3
    errors = checks(findings, "error")
    assert ("queue-type", "queue events.mails") in errors
    assert ("queue-arguments", "queue events.mails.retry") in errors
    said = {finding["what"] for finding in findings}
    assert "its x-delivery-limit is 5, and the bus wants 100" in said


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("policies", {"max-length": 1000}),
        ("policies", {"message-ttl": 1000}),
        ("policies", {"expires": 86_400_000}),
        ("operator-policies", {"delivery-limit": 3}),
    ],
)
def test_a_policy_that_breaks_the_design_is_an_error(
    kind: str, definition: dict[str, object], every_line: BrokerServer, shop: Path
) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    body = {"pattern": r"^events\.mails\.retry$", "definition": definition, "apply-to": "queues"}
    mails.api("PUT", f"/{kind}/VHOST/limits", body)

    code, findings = mails.until(lambda findings: checks(findings, "error"))

    assert code == 3
    assert checks(findings, "error") == {("policy", "queue events.mails.retry")}
    (error,) = [finding for finding in findings if finding["severity"] == "error"]
    assert "policy 'limits' sets" in error["what"]


def test_a_policy_that_hides_unroutable_events_is_an_error(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    body = {"pattern": "^events$", "definition": {"alternate-exchange": "amq.fanout"}, "apply-to": "exchanges"}
    mails.api("PUT", "/policies/VHOST/catch", body)

    code, findings = mails.until(lambda findings: checks(findings, "error"))

    assert (code, checks(findings, "error")) == (3, {("policy", "exchange events")})


def test_missing_bindings_are_errors_that_apply_mends(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    level = f"{'%2A.' * 20}1.%23"
    mails.api("DELETE", "/bindings/VHOST/e/events/q/events.mails/ordered.%2A")
    mails.api("DELETE", "/bindings/VHOST/e/events.dead/q/events.mails.dead/mails")
    mails.api("DELETE", f"/bindings/VHOST/e/events.delay.v1.03/q/events.delay.v1.03/{level}")

    code, findings = mails.verify()
    mails.apply("--prune")
    mended, _ = mails.verify()

    assert code == 3
    assert checks(findings, "error") == {
        ("missing-binding", "queue events.mails"),
        ("dead-letter-target", "queue events.mails.dead"),
        ("missing-binding", "queue events.delay.v1.03"),
    }
    assert mended == 0


def test_an_alarm_is_an_error(own_broker_of_every_line: BrokerServer, shop: Path) -> None:
    broker = own_broker_of_every_line
    mails = Shop(broker, shop)
    mails.apply()
    broker.ctl("set_vm_memory_high_watermark", "0.000001")
    try:
        code, findings = mails.until(lambda findings: checks(findings, "error"))
    finally:
        broker.ctl("set_vm_memory_high_watermark", "0.6")

    assert code == 3
    ((check, where),) = checks(findings, "error")
    assert check == "alarm"
    assert where.startswith("memory alarm on ")
    assert mails.until(lambda findings: not checks(findings, "error"))[0] == 0


# ── without the management interface ────────────────────────────────────────────────────────────────


def test_over_amqp_alone_the_rest_is_named_as_not_checked(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    mails.delete_queue("events.mails")

    # Not where it usually is; and if another broker of this machine is there, it is not taken for this one.
    done = eventbus("topology", "verify", "shop:mails", "--json", "--url", mails.url, cwd=shop)

    findings = done.json["findings"]
    assert done.code == 3
    assert checks(findings, "error") == {("missing", "queue events.mails")}
    assert ("no-consumer", "queue events.mails.retry") in checks(findings, "warning")
    assert {"bindings", "alarms, nodes, flags"} <= {f["where"] for f in findings if f["check"] == "not-checked"}


def test_what_a_user_is_not_told_is_named_as_not_checked(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    mails.api("PUT", "/users/looker", {"password": "secret", "tags": "management"})
    looker = with_login(mails.url, "looker", "secret")
    every_line.set_permissions(looker)

    where = ("--url", looker, "--management", every_line.management_url)
    done = eventbus("topology", "verify", "shop:mails", "--json", *where, cwd=shop)

    not_checked = [finding for finding in done.json["findings"] if finding["check"] == "not-checked"]
    assert done.code == 0
    assert "the cluster's nodes" in {finding["where"] for finding in not_checked}
    assert "bindings" not in {finding["where"] for finding in not_checked}
    assert "user 'looker' may not ask" in not_checked[0]["what"]
    assert "secret" not in done.out


def test_a_management_interface_that_was_named_must_answer(rabbitmq_url: str, shop: Path) -> None:
    words = ("topology", "verify", "shop:mails", "--url", rabbitmq_url)

    by_option = eventbus(*words, "--management", "http://127.0.0.1:1", cwd=shop)
    by_variable = eventbus(*words, cwd=shop, EVENTBUS_MANAGEMENT_URL="http://127.0.0.1:1")

    for done in (by_option, by_variable):
        assert (done.code, done.out) == (1, "")
        assert "no management interface answers at http://127.0.0.1:1 " in done.error


# ── apply --prune ───────────────────────────────────────────────────────────────────────────────────


def test_prune_removes_what_a_subscription_that_is_gone_has_left(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    (shop / "shop.py").write_text(SHOP + OLD_SUBSCRIPTION)
    mails.apply()
    assert mails.topology("apply", "shop:audit").code == 0
    (shop / "shop.py").write_text(SHOP)

    code, findings = mails.verify()
    mails.apply()
    kept = mails.keys_of("events.mails")
    pruned = mails.apply("--prune")
    again = mails.apply("--prune", "--json")

    assert code == 0
    assert ("leftover-binding", "queue events.mails") in checks(findings, "warning")
    assert kept == ["cancelled.*", "ordered.*"]
    assert mails.keys_of("events.mails") == ["ordered.*"]
    assert mails.keys_of("events.audit") == ["ordered.*"]
    assert "removed  cancelled.* from events to events.mails\n" in pruned.out
    assert "removed  (24 words).publish.cancelled.* from events.delay.v1.end to events.mails\n" in pruned.out
    assert again.json["pruned"] == []
    assert "leftover-binding" not in {finding["check"] for finding in mails.verify()[1]}


# ── remove ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_service_at_work_is_not_removed(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    with running("run", "shop:mails", "--url", mails.url, cwd=shop, wait_for="ready"):
        done = mails.topology("remove", "mails", "--yes")

    assert done.code == 1
    assert "stop the service's workers first" in done.error
    assert mails.keys_of("events.mails") == ["ordered.*"]


def test_what_waits_in_the_delay_tree_is_waited_for(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    assert mails.topology("apply", "shop:audit").code == 0
    with running("run", "shop:mails", "--url", mails.url, cwd=shop, wait_for="ready") as worker:
        mails.publish("later")
        worker.wait_for("mailing later")
        worker.end()

    done = mails.topology("remove", "mails", "--yes", "--json")

    assert done.code == 0, done.err
    assert "waiting for the delay tree" in done.err
    assert done.json == {
        "deleted": ["events.mails", "events.mails.retry", "events.mails.dead"],
        "kept": [],
        "discarded": 1,
    }
    assert "undeliverable" not in {finding["check"] for finding in mails.verify()[1]}
    assert {name for name in mails.queues() if "mails" in name} == set()
    assert mails.keys_of("events.audit") == ["ordered.*"]


def test_nothing_is_deleted_before_the_delay_tree_is_clear(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    with running("run", "shop:mails", "--url", mails.url, cwd=shop, wait_for="ready") as worker:
        mails.publish("much later")
        worker.wait_for("mailing much later")
        worker.end()

    done = mails.topology("remove", "mails", "--yes", "--wait", "0")

    assert done.code == 1
    assert "it gets no fresh events any more. Remove it again later" in done.err.splitlines()[-1]
    assert {name for name in mails.queues() if "mails" in name} == {
        "events.mails",
        "events.mails.retry",
        "events.mails.dead",
    }
    assert mails.keys_of("events.mails") == []


def test_dead_letters_are_kept_unless_they_are_named(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    with running("run", "shop:mails", "--url", mails.url, cwd=shop, wait_for="ready") as worker:
        mails.publish("bad")
        worker.wait_for("gave up (rejected)")
        worker.end()

    kept = mails.topology("remove", "mails", "--yes")
    letters = eventbus("dead", "list", "mails", "--json", "--url", mails.url, cwd=shop).json
    named = mails.topology("remove", "mails", "--yes", "--dead-letters", "--json")

    assert "deleted events.mails\n" in kept.out
    assert "kept    events.mails.dead" in kept.out
    assert len(letters) == 1
    assert named.json == {"deleted": ["events.mails.dead"], "kept": [], "discarded": 1}
    assert mails.topology("remove", "mails", "--yes").error.startswith("there is no service 'mails'")


def test_removing_asks_first(every_line: BrokerServer, shop: Path) -> None:
    mails = Shop(every_line, shop)
    mails.apply()
    mails.publish("one")

    in_a_script = mails.topology("remove", "mails")
    refused = on_a_terminal("topology", "remove", "mails", *mails.here, cwd=shop, answers={"[y/N]": "n\n"})
    before = set(mails.queues())
    agreed = on_a_terminal("topology", "remove", "mails", *mails.here, cwd=shop, answers={"[y/N]": "y\n"})

    assert in_a_script.code == 2
    assert "--yes" in in_a_script.error
    assert "Remove mails with the 1 that wait in its queues?" in refused.out
    assert (refused.code, "events.mails" in before) == (0, True)
    assert agreed.code == 0
    assert "deleted events.mails" in agreed.out
