"""The demo as people start it, a process of its own: its figures, its story, its sabotages, and that it leaves nothing.

The figures stand here as numbers, once: 20 registrations, 30 orders, what follows from them, and 2 that came twice.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from eventbus.service import check_all
from schemas import CATALOGUE
from services.demo.ledger import MAILS, WANTED, Fact, Handling, Ledger
from services.demo.scenario import KINDS
from services.demo.stage import LISTENERS
from tests.servers import BrokerServer, vhost_of

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240.0  # it takes some seconds on an idle computer, and a minute beside other tests on a busy one
FIGURES = {"published": 145, "handled": 508, "duplicates": 9, "retried": 6, "dead_lettered": 1, "lost": 0}


@dataclass
class Demo:
    """The demo at work, and where its files go."""

    process: subprocess.Popen[str]
    folder: Path

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it said on stdout and stderr."""
        out, err = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out, err

    def read_until(self, words: str) -> str:
        """What it says, up to the line with *words*."""
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if words in line:
                return said
        raise AssertionError(f"it ended without saying {words!r}: {said}")


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Demo]:
    environment = os.environ | {"TMPDIR": str(folder), "EVENTBUS_DECLARE": "never", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.demo", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(DEADLINE_S, process.kill)  # who waits for its words waits no longer than this
    watchdog.start()
    try:
        yield Demo(process, folder)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    with started(folder, *arguments) as demo:
        return demo.end()


def figures_of(out: str) -> dict[str, float]:
    """The last line of stdout, without the time that it took."""
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    assert 0 < figures.pop("seconds") < DEADLINE_S
    return figures


def test_every_expectation_holds_on_the_embedded_broker_and_each_event_has_its_line(tmp_path: Path) -> None:
    code, out, story = run(tmp_path, "--json")

    assert code == 0, story
    assert len(out.splitlines()) == 1  # with --json, stdout has the figures and nothing else
    assert figures_of(out) == FIGURES
    assert "\x1b" not in story
    marks = Counter(re.findall(r"^ *[\d.]+ s ([+~x=!]) ", story, re.MULTILINE))
    assert marks == {"+": 143, "~": 6, "x": 1, "=": 2}
    assert re.search(r"notifications\.welcome: attempt 1 failed, next in 0\.\d+ s: MailServerBusy: .* 451", story)
    assert re.search(r"order 17 .*payments\.capture: given up after attempt 1, rejected: no account takes XTS", story)
    assert re.search(r"order_shipped  order 2 .* by shipping: .*notifications \d+ ms", story)
    assert re.search(r"── order_shipped  published by shipping.*\n.*── \w+\.\w+  \d+ ms", story)
    assert re.search(r"lost +0 ", story)
    assert re.search(r"(\d+) of \1 expectations held", story)
    assert "make demo URL=" in story
    assert list(tmp_path.iterdir()) == []


def test_the_figures_are_the_same_on_every_rabbitmq_and_nothing_is_left_on_it(
    every_line: BrokerServer, tmp_path: Path
) -> None:
    url = every_line.new_vhost()

    code, out, err = run(tmp_path, "--json", "--url", url)

    assert code == 0, err
    assert figures_of(out) == FIGURES
    assert queues(every_line, url) == []
    exchanges = every_line.api("GET", f"/exchanges/{vhost_of(url)}")
    assert isinstance(exchanges, list)
    assert [exchange["name"] for exchange in exchanges if not exchange["name"].startswith("amq.")] == [""]


def queues(broker: BrokerServer, url: str) -> object:
    return broker.api("GET", f"/queues/{vhost_of(url)}")


def test_a_lost_delivery_shows(tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "--sabotage", "lose")

    assert_loss_shows(code, out)


def test_a_delivery_that_a_rabbitmq_loses_shows(rabbitmq_url: str, tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "--sabotage", "lose", "--url", rabbitmq_url)

    assert_loss_shows(code, out)


def assert_loss_shows(code: int, out: str) -> None:
    assert code == 1, out
    assert "user_registered of Ada is lost: notifications.welcome never handled it" in out
    assert failed(out) == {
        "handled: 507, expected 508",
        "lost: 1, expected 0",
        "mails in the mailbox: 78, expected 79",
    }


def test_what_is_done_twice_shows(tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "--sabotage", "twice")

    assert_done_twice_shows(code, out)


def test_what_is_done_twice_on_a_rabbitmq_shows(rabbitmq_url: str, tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "--sabotage", "twice", "--url", rabbitmq_url)

    assert_done_twice_shows(code, out)


def assert_done_twice_shows(code: int, out: str) -> None:
    assert code == 1, out
    assert "user_registered of Chidi was handled 2 times by audit.write_down" in out
    # Both repeated events stand in the audit log twice. Payments, inventory and shipping have the order in their inbox,
    # and so nothing followed from it again.
    assert failed(out) == {"duplicates suppressed: 0, expected 9", "done twice: 2, expected 0"}


def failed(out: str) -> set[str]:
    return set(re.findall(r"^FAILED  (.*)$", out, re.MULTILINE))


def test_a_broker_that_nobody_answers_at_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    code, _, err = run(tmp_path, "--url", f"amqp://guest:secret@127.0.0.1:{port}/")

    assert code == 1
    assert re.fullmatch(rf"error: .*127\.0\.0\.1:{port}.*\n", err), err
    assert "secret" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_signal_in_the_middle_ends_it_in_order(broker: BrokerServer, tmp_path: Path) -> None:
    url = broker.new_vhost()
    with started(tmp_path, "--url", url) as demo:
        demo.read_until("orders are placed")
        demo.process.send_signal(signal.SIGINT)

        code, out, err = demo.end()

    assert (code, err) == (130, "")
    assert out.splitlines()[-1].endswith("interrupted")
    assert list(tmp_path.iterdir()) == []
    assert queues(broker, url) == []


def test_on_a_terminal_a_table_moves_and_a_shop_that_is_kept_takes_orders_until_a_signal(tmp_path: Path) -> None:
    with terminal(tmp_path, "--keep") as (process, screen):
        shown = read_until(screen, r"SMTP +\S+\r\n")
        doors = dict(re.findall(r"^  (users|orders|mailbox) +(http://\S+)/\w+\r$", shown, re.MULTILINE))
        line = {"sku": "mug", "quantity": 1, "unit_price": "5.00"}
        order = {"order_id": str(uuid4()), "email": "eve@example.com", "address": "1 Way", "lines": [line]}

        answer = httpx.post(f"{doors['orders']}/orders", json=order, timeout=60.0)

        assert answer.status_code == 202, answer.text
        read_until(screen, r"order_shipped .* by shipping")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0, shown
    assert shown.rindex("\x1b[?25h") > shown.index("\x1b[?25l")  # the cursor comes back
    tables = re.findall(r"notifications +\. +(\S+) +(\S+) +\. ", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown))
    assert len(set(tables)) > 5  # it has moved
    assert tables[-1] == ("79", "6")


@contextmanager
def terminal(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The demo on a terminal, and where what is shown can be read."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.demo", *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder), "TERM": "xterm", "COLUMNS": "200", "LINES": "40"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)


def read_until(screen: int, pattern: str) -> str:
    """What is shown, until *pattern* is in it."""
    deadline_s, shown = time.monotonic() + DEADLINE_S, b""
    while not re.search(pattern, shown.decode(errors="replace")):
        readable, _, _ = select.select([screen], [], [], max(0.0, deadline_s - time.monotonic()))
        assert readable, f"never shown: {pattern}; but {shown[-3000:].decode(errors='replace')}"
        shown += os.read(screen, 65536)
    return shown.decode()


# ── the ledger ──────────────────────────────────────────────────────────────────────────────────────


def test_the_ledger_knows_every_subscription_of_the_shop() -> None:
    subscribed = {
        event.event_name: {
            f"{service}.{subscription.handler}"
            for service, subscriptions in check_all(LISTENERS).items()
            for subscription in subscriptions
            if subscription.wants(event.event_type)
        }
        for event in CATALOGUE
    }

    assert {event: set(handlers) for event, handlers in WANTED.items()} == subscribed


def test_the_scenario_is_the_promised_one() -> None:
    assert Counter(KINDS.values()) == {"declined": 3, "out of stock": 2, "poison": 1}


@pytest.fixture
def registered() -> Fact:
    return Fact("user_registered", uuid4())


def test_what_somebody_has_not_handled_is_lost(registered: Fact) -> None:
    done = Counter(Handling(registered, handler) for handler in WANTED["user_registered"][1:])

    ledger = Ledger(Counter([registered]), done)

    assert ledger.lost == {registered}
    assert ledger.handled == 2


def test_what_was_given_up_is_not_lost(registered: Fact) -> None:
    first, *others = WANTED["user_registered"]
    done = Counter(Handling(registered, handler) for handler in others)

    ledger = Ledger(Counter([registered]), done, Counter([Handling(registered, first)]))

    assert ledger.lost == frozenset()
    assert ledger.handled == 2


def test_what_was_done_again_and_what_nobody_published_is_seen(registered: Fact) -> None:
    unheard_of = Handling(Fact("user_registered", uuid4()), MAILS["Welcome to the shop"][1])
    again = Handling(registered, "audit.write_down")

    ledger = Ledger(Counter([registered, registered]), Counter([again, again, unheard_of]))

    assert ledger.done_again == {again: 1}
    assert ledger.unexplained == {unheard_of}
