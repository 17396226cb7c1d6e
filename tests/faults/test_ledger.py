"""The ledger's short form on every broker line, and the proof that it can fail: wrong builds are found out.

`make ledger` runs all of it, with more events.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ledger import report
from tests.faults.ledger.books import key_of, open_books
from tests.faults.ledger.cells import CELLS, SHORT
from tests.faults.ledger.count import count
from tests.faults.ledger.run import run_cell
from tests.servers import BrokerServer

EVENTS = 150
FIELDS = [
    "broker", "fault", "published", "confirmed", "handled", "duplicates", "dead_lettered", "destroyed", "lost",
    "done_twice", "recovery_s", "events", "versions", "started", "seed",
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
    result = await run_cell(CELLS["retry-copy-returned"], own_broker, events=EVENTS, saboteur=saboteur, quiet_s=3)

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
