"""The benchmark counts rightly, and in small it runs; what is slow about it is its command, `make bench`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import without
from benchmarks.databases import Databases
from benchmarks.figures import (
    HANDLE,
    PUBLISH_ONE,
    PUBLISH_WINDOW,
    RELAYED,
    TRANSACTION,
    TRANSACTION_WITH_EVENT,
    Figure,
    Figures,
    latencies_of,
    rate_of,
    ratios_of,
)
from benchmarks.order import Order, lines_of, note_of
from benchmarks.plan import FASTSTREAM, GROUPS, NOTES, OURS, OUTBOXES, PIKA, SHARES, C, Cell, Database, cells
from benchmarks.stage import ProgramError, Stage
from tests.servers import BrokerServer
from tests.stores import NoStore

EVENTS = 300
ROWS = 4000  # several batches of each relay


def track(*marks: tuple[int, float]) -> dict[str, object]:
    return {"marks": marks, "count": marks[-1][0]}


def cell(program: str, **options: object) -> Cell:
    return Cell(kind="flow", program=program, events=EVENTS, groups=frozenset(), options=options)


@pytest.fixture(scope="module")
def databases() -> Iterator[Databases]:
    databases = Databases()
    yield databases
    databases.close()


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rate_is_counted_without_the_warm_up() -> None:
    assert rate_of([track((200, 0.0), (1000, 10.0), (2000, 11.0), (3000, 12.0))]) == 1000


def test_processes_are_counted_while_all_of_them_work() -> None:
    alone_first = track((100, 0.0), (1000, 10.0), (2000, 20.0))
    late = track((100, 10.0), (1000, 20.0))

    assert rate_of([alone_first, late]) == pytest.approx(100 + 90)


def test_processes_that_did_not_work_together_have_no_rate() -> None:
    with pytest.raises(ValueError, match="same time"):
        rate_of([track((10, 0.0), (20, 1.0)), track((10, 2.0), (20, 3.0))])


def test_percentiles_are_of_what_came_after_the_warm_up() -> None:
    answer = {"latencies_us": [9_000_000] * 500 + list(range(1000, 101_000, 50))}

    assert [figure.value for figure in latencies_of(answer)] == [51.0, 100.0, 100.9]


def test_a_ratio_is_the_median_of_what_it_was_in_each_round() -> None:
    figures = Figures()
    for ours, c in ((10.0, 20.0), (80.0, 100.0), (300.0, 400.0)):  # a machine that gets faster as it goes
        figures.add(OURS, "", Figure(HANDLE, ours))
        figures.add(C, "", Figure(HANDLE, c))

    assert ratios_of(figures) == {"handle_vs_c": 0.75}


def test_ratios_of_unlike_rounds_are_of_medians_and_only_what_was_measured_has_one() -> None:
    figures = Figures()
    for value in (10.0, 80.0, 90.0):
        figures.add(OURS, "", Figure(HANDLE, value))
        figures.add(OURS, "", Figure(PUBLISH_WINDOW, value))
    figures.add(C, "", Figure(HANDLE, 160.0))
    figures.add(OURS, "with tracing", Figure(HANDLE, 60.0))
    figures.add(OURS, "with tracing", Figure(PUBLISH_WINDOW, 40.0))
    figures.add(OURS, "one by one", Figure(PUBLISH_ONE, 1.0))

    figures.add(C, "no headers", Figure(HANDLE, 200.0))

    assert ratios_of(figures) == {
        "handle_vs_c": 0.5, "handle_vs_c_without_headers": 0.4, "tracing_on_vs_off": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("published", "enough"), [(20_000.0, 0.8), (5_000.0, 1.333)])
def test_relays_are_held_to_five_thousand_rows_or_to_what_the_bus_publishes(published: float, enough: float) -> None:
    figures = Figures()
    figures.add(OURS, "", Figure(PUBLISH_WINDOW, published))
    figures.add(OURS, "2 relays on PostgreSQL", Figure(RELAYED, 4000.0))

    assert ratios_of(figures) == {"relay_vs_enough": enough}


@pytest.mark.parametrize("size", [100, 420, 10_000])
def test_an_order_is_as_long_as_it_says(size: int) -> None:
    order = Order(number=123_456, sent_ns=10**12 + 1, lines=lines_of(size), note=note_of(size))

    assert len(order.model_dump_json()) == size


def test_every_group_measures_something_and_every_program_has_its_note() -> None:
    assert set().union(*(cell.groups for cell in cells(1000))) == set(GROUPS)
    assert set(SHARES) == set(NOTES) == {cell.program for cell in cells(1000)}


def test_what_is_written_has_every_figure_and_leaves_the_pages_prose_alone(tmp_path: Path) -> None:
    run = report.Run("whole", 1, 10, "2026-11-22T00:00:00+00:00", {"processor": "p", "cores": 2, "memory_gb": 8,
                     "system": "s"}, {"python": "3"})  # fmt: skip
    for program, value in ((OURS, 20_000.0), (FASTSTREAM, 4_000.0)):
        run.figures.add(program, "", Figure(PUBLISH_WINDOW, value))
    page = tmp_path / "PERFORMANCE.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")

    written = json.loads(report.write_json(run, tmp_path).read_text())
    report.write_markdown(run, page)
    report.write_markdown(run, page)

    assert written["ratios"] == {"publish_window_vs_faststream": 5.0}
    assert [figure["rounds"] for figure in written["figures"]] == [[20_000], [4_000]]
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert text.count("20,000") == 1


# ── programs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("program", [OURS, PIKA])
def test_a_program_publishes_and_handles_all(program: str, broker: BrokerServer, databases: Databases) -> None:
    figures, _ = Stage(broker, None, databases).run(cell(program))

    assert {figure.what for figure in figures} >= {PUBLISH_WINDOW, HANDLE}
    assert all(figure.value > 0 for figure in figures)


def test_latency_tracing_and_many_subscriptions_are_measured(broker: BrokerServer, databases: Databases) -> None:
    stage = Stage(broker, None, databases)
    latency = Cell(kind="latency", program=OURS, events=EVENTS, groups=frozenset())

    figures, _ = stage.run(latency)
    situations, _ = stage.run(cell(OURS, tracing=True, subscriptions=3, slow_every=EVENTS, how="many"))

    assert [figure.what for figure in figures] == ["latency p50", "latency p99", "latency p99.9"]
    assert HANDLE in {figure.what for figure in situations}


@pytest.mark.parametrize("database", ["redis", "sqlite", "postgresql"])
def test_keys_in_each_kind_of_store_are_measured(
    database: Database, broker: BrokerServer, databases: Databases
) -> None:
    figures, _ = Stage(broker, None, databases).run(replace(cell(OURS), database=database))

    assert HANDLE in {figure.what for figure in figures}


@pytest.mark.parametrize("database", OUTBOXES)
def test_an_outbox_is_measured(database: Database, broker: BrokerServer, databases: Databases) -> None:
    stage = Stage(broker, None, databases)
    relays = Cell(
        kind="relay", program=OURS, events=ROWS, groups=frozenset(), processes=2, database=database
    )  # fails where a row arrives twice, or before another of its key

    relayed, _ = stage.run(relays)
    latency, _ = stage.run(replace(relays, kind="pick up", events=EVENTS))
    taken, _ = stage.run(replace(relays, kind="transaction", events=EVENTS))

    assert [figure.what for figure in relayed] == [RELAYED]
    assert [figure.what for figure in latency] == ["latency p50", "latency p99", "latency p99.9"]
    assert [figure.what for figure in taken] == [TRANSACTION, TRANSACTION_WITH_EVENT]
    assert all(figure.value > 0 for figure in (*relayed, *latency, *taken))


def test_a_database_that_there_is_not_is_told_and_the_others_are_measured(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: Databases, name: str) -> str:
        if name == "redis":
            raise NoStore("install redis-server")
        return f"{name}: native"

    monkeypatch.setattr(Databases, "start", start)
    run = report.Run("whole", 1, 10, "2026-11-22T00:00:00+00:00", {}, {})

    assert list(without(databases, {"", "redis", "sqlite", "postgresql"}, run)) == ["redis"]
    assert run.notes == ["postgresql: native", "redis: not measured: install redis-server"]


def test_a_program_that_fails_is_told_with_its_last_words(broker: BrokerServer, databases: Databases) -> None:
    with pytest.raises(ProgramError, match="TypeError"):
        Stage(broker, None, databases).run(cell(PIKA, payload="many"))
