"""Cluster cells run where a cluster can be made, and are told of where not. `make ledger` runs them: they take long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cluster
from tests.faults.ledger.__main__ import UNUSABLE, lines_for, main, options_of
from tests.faults.ledger.cells import CELLS
from tests.faults.ledger.known import known_bugs
from tests.servers import find_own_lines


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "docker_client", lambda: None)


@pytest.mark.usefixtures("no_engine")
def test_without_an_engine_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_for(list(CELLS.values()), options_of([]))

    assert lines == list(find_own_lines())
    assert capsys.readouterr().out == "4.3-cluster is left out: no Docker engine answers\n"


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("asked_for", [["--broker", "4.3-cluster"], ["--cell", "leader-killed"]], ids=" ".join)
def test_without_an_engine_a_cluster_that_was_asked_for_is_an_error(
    asked_for: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked_for, "--into", str(tmp_path)]) == UNUSABLE

    assert capsys.readouterr().err == "no 4.3-cluster here: no Docker engine answers\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cell", "broker", "says"),
    [
        ("leader-killed", "4.3", "leader-killed needs a cluster"),
        ("worker-killed", "4.3-cluster", "worker-killed is not among what breaks in a cluster"),
    ],
)
def test_a_cell_runs_only_where_it_means_something(
    cell: str, broker: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cell", cell, "--broker", broker, "--into", str(tmp_path)]) == UNUSABLE

    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_node_has_no_cells_of_a_cluster() -> None:
    in_cluster = [cell.name for cell in CELLS.values() if cell.needs_cluster]

    assert in_cluster == [
        "leader-killed",
        "leader-killed-connected-to-it",
        "follower-killed",
        "node-partitioned",
        "node-partitioned-with-its-clients",
    ]
    assert lines_for([CELLS["worker-killed"]], options_of([])) == list(find_own_lines())


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("3.10.8", ["| 3.10.8 | all found since | assume so | never | this line gets no fixes any more |"]),
        ("4.3.6", ["| 4.3.6 | none known | | | |"]),
    ],
)
def test_the_report_says_what_is_known_of_a_broker(version: str, told: list[str]) -> None:
    assert known_bugs([version])[3:] == told


def test_the_report_names_a_brokers_own_bugs_by_number() -> None:
    bugs = [row.split(" | ")[1] for row in known_bugs(["4.0.5", "4.0.5"])[3:]]

    assert bugs == ["PR 13530", "issue 14589", "PR 16203", "PR 16652"]
