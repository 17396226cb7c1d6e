"""Which versions are known to lose or to stand still."""

from __future__ import annotations

import pytest

from eventbus.transport.rabbitmq.bugs import BUGS, Bug, bugs_of, version_of


@pytest.mark.parametrize(
    ("text", "version"),
    [("3.10.8", (3, 10, 8)), ("4.3.0-rc.1", (4, 3, 0)), ("4.2", (4, 2, 0)), ("4.1.4+1", (4, 1, 4)), ("", (0, 0, 0))],
)
def test_a_version_is_three_numbers(text: str, version: tuple[int, int, int]) -> None:
    assert version_of(text) == version


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.source)
def test_a_bug_is_in_the_versions_from_its_first_up_to_its_fix(bug: Bug) -> None:
    assert bug in bugs_of(bug.since)
    assert bug not in bugs_of(bug.fixed)


@pytest.mark.parametrize(("version", "sources"), [("4.3.6", []), ("4.3.4", ["PR 17012"]), ("4.2.9", ["PR 16652"])])
def test_newer_versions_have_fewer(version: str, sources: list[str]) -> None:
    assert [bug.source for bug in bugs_of(version_of(version))] == sources
