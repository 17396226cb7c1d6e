"""The ledger's short form on every broker line, and the proof that it can fail: wrong builds are found out.

`make ledger` runs all of it, with more events.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.faults.ledger import report
from tests.faults.ledger.__main__ import main
from tests.faults.ledger.books import FOLLOWS, key_of, open_books
from tests.faults.ledger.cells import CELLS, SHORT
from tests.faults.ledger.count import all_handle_again, count
from tests.faults.ledger.events import specials
from tests.faults.ledger.run import Result, run_cell
from tests.servers import BrokerServer

EVENTS = 150
FIELDS = [
    "broker", "fault", "published", "confirmed", "handled", "duplicates", "dead_lettered", "destroyed", "lost",
    "done_twice", "recovery_s", "events", "versions", "started", "seed", "lane",
]  # fmt: skip
RECOVERY_S = 30.0  # a reconnect, on a busy computer; the published ledger is held to less


@pytest.mark.parametrize("name", SHORT)
async def test_nothing_is_lost_and_nothing_is_done_twice(own_broker_of_every_line: BrokerServer, name: str) -> None:
    result = await run_cell(CELLS[name], own_broker_of_every_line, events=EVENTS)

    counted = result.counted
    assert counted.published == counted.confirmed == EVENTS
    assert not counted.lost
    assert not counted.done_twice
    assert not counted.dead_lettered
    assert len(counted.handled) == EVENTS
    # None: on a very busy computer the fault may be over when all events are handled.
    assert result.recovery_s is None or result.recovery_s < RECOVERY_S
    assert list(report.as_json(result)) == FIELDS


@pytest.mark.parametrize("saboteur", ["ack-first", "returns-are-success"])
async def test_a_build_that_loses_is_found_out(own_broker: BrokerServer, saboteur: str) -> None:
    # Every handler fails, so that the one worker holds more copies than it will, pauses, and gives back the originals.
    cell = dataclasses.replace(CELLS["retry-copy-returned"], every=1, share=1.0, workers=1)

    result = await run_cell(cell, own_broker, events=EVENTS, saboteur=saboteur, quiet_s=3)

    assert result.counted.lost
    assert not result.is_good


async def test_a_build_that_does_things_twice_is_found_out(own_broker: BrokerServer) -> None:
    result = await run_cell(CELLS["queue-full"], own_broker, events=EVENTS, saboteur="forget", quiet_s=3)

    assert result.counted.done_twice
    assert not result.is_good


def test_every_event_is_counted_as_what_became_of_it(tmp_path: Path) -> None:
    books = open_books(tmp_path / "books.sqlite")
    for number, name in enumerate(["fine", "lost", "dead", "destroyed", "again", "by one", "unconfirmed"]):
        confirmed = None if name == "unconfirmed" else 2.0
        books.execute("insert into published values (?, ?, 1, ?)", (name, number, confirmed))
    for service, event in [("a", "fine"), ("b", "fine"), ("a", "again"), ("b", "again"), ("a", "by one")]:
        books.execute("insert into effects values (?, ?, (select number from published where event = ?), 3, 1)",
                      (service, event, event))  # fmt: skip
    books.execute("insert into effects values ('a', 'another id of again', 4, 3, 3)")
    books.execute("insert into claims values (?, 't', 9, 0, 3)", (key_of("a", "fine"),))
    books.execute("insert into runs values ('a', 'fine', 0, 1, 2), ('a', 'fine', 0, 1, 4)")
    books.execute("insert into suppressed values ('key', 3)")

    counted = count(books, ("a", "b"), dead={"dead"}, destroyed={"destroyed", "fine"})
    books.close()

    assert (counted.published, counted.confirmed) == (7, 6)
    assert counted.handled == {"fine", "again"}
    assert counted.lost == {"lost", "by one"}
    assert counted.dead_lettered == {"dead"}
    assert counted.destroyed == {"destroyed"}
    assert counted.duplicates == 3
    assert "fine" in counted.done_twice  # it ran after it was recorded as done
    assert counted.done_twice & {"again", "another id of again"}  # one fact with two effects
    assert not counted.done_twice & {"lost", "by one"}


def test_what_a_handler_published_and_nobody_handled_is_lost(tmp_path: Path) -> None:
    books = open_books(tmp_path / "books.sqlite")
    for number, name in enumerate(["followed", "not followed", "publishes nothing"]):
        books.execute("insert into published values (?, ?, 1, 2)", (name, number))
        books.execute("insert into effects values ('a', ?, ?, 3, 1)", (name, number))
    books.execute("insert into effects values (?, 'its own id', 0, 4, 1)", ("a" + FOLLOWS,))

    counted = count(books, ("a",), dead=(), destroyed=(), publishing={0, 1})
    books.close()

    assert counted.lost == {"what a published for 1"}


def test_recovery_is_when_every_service_has_handled_what_came_after_the_fault(tmp_path: Path) -> None:
    books = open_books(tmp_path / "books.sqlite")
    for service, event, began, at in [("a", "at work", 9.5, 10.5), ("a", "late", 11, 11.5), ("b", "late", 11.5, 13.0)]:
        books.execute("insert into runs values (?, ?, 0, 1, ?)", (service, event, began))
        books.execute("insert into effects values (?, ?, 0, ?, 1)", (service, event, at))
    books.execute("insert into published values ('late', 0, 10.2, 11.2), ('at work', 1, 8, 9), ('waiting', 2, 8, 10.1)")
    books.execute("insert into runs values ('a', 'waiting', 2, 1, 10.5)")
    books.execute("insert into effects values ('a', 'waiting', 2, 10.6, 1)")

    waiting = all_handle_again(books, ("a", "b"), 10.0, new=False), all_handle_again(books, ("a",), 10.0, new=False)
    recovered = [all_handle_again(books, services, 10.0) for services in ("a", "b", "ab", "c")]
    books.close()

    assert waiting == (13.0, 10.6)
    assert recovered == [11.5, 13.0, 13.0, None]


@pytest.mark.parametrize(("recovery_s", "is_good"), [(None, True), (9.9, True), (10.1, False)])
def test_a_late_recovery_is_not_good(tmp_path: Path, recovery_s: float | None, is_good: bool) -> None:
    books = open_books(tmp_path / "books.sqlite")
    counted = count(books, ("a",), dead=(), destroyed=())
    books.close()

    result = Result(CELLS["broker-killed"], "4.3", counted, 0, recovery_s, 1.0, "now", 1, {})

    assert result.is_good is is_good


@pytest.mark.parametrize("events", [1, 2, 99, 100, 1000, 10_000])
@pytest.mark.parametrize("every", [2, 50, 1000])
def test_special_events_leave_a_flow_behind_them(events: int, every: int) -> None:
    chosen = specials(events, every, 0.7)

    assert chosen
    assert max(chosen) <= 0.7 * events


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--events", "0"], "needs 100 at least"),
        (["--events", "-3"], "needs 100 at least"),
        (["--cell", "broker-killed", "--events", "1"], "needs 100 at least"),
        (["--cell", "no-such"], "invalid choice: 'no-such'"),
        (["--broker", "2.8"], "no RabbitMQ 2.8 here"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        code: object = main([*arguments, "--into", str(tmp_path)])
    except SystemExit as end:
        code = end.code

    assert code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_broken_off_goes_on_with_what_is_missing_of_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ledger.json").write_text(
        json.dumps(
            [
                {"broker": "4.3", "fault": "nothing", "lane": "on"},
                {"broker": "4.3", "fault": "worker-killed", "lane": "off"},
                {"broker": "4.0", "fault": "poison", "lane": "on"},
            ]
        )
    )

    monkeypatch.delenv("EVENTBUS_LANE", raising=False)  # all tests run without the lane, too
    assert report.faults_of("4.3", tmp_path) == {"nothing"}
    monkeypatch.setenv("EVENTBUS_LANE", "off")
    assert report.faults_of("4.3", tmp_path) == {"worker-killed"}
