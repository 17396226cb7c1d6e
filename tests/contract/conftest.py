"""What an adapter cannot do is in the report: a case that needs it is not run there, and not passed over in silence."""

from __future__ import annotations

import pytest

LACKING = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LACKING] = []
    config.addinivalue_line(
        "markers", "needs(capability): run only for adapters that have it; the report says which not"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lacking = config.stash[LACKING]
    for line in sorted(set(lacking)):
        terminalreporter.write_line(f"contract: {line}")
