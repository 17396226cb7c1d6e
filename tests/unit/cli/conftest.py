"""The command line in this process, for what needs no broker: fast, and with everything that it changed put back."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from eventbus import cli

HELLO = """
from eventbus import Catalogue, Event, Service


class Greeted(Event, name="greeted", version=1):
    name: str
    times: int = 1


class GreetedNew(Event, name="greeted", version=2):
    name: str
    times: int


greeter = Service("greeter")


@greeter.on("greeted")
async def greet(event: Greeted | GreetedNew) -> None: ...
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the program ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


Eventbus = Callable[..., Ended]


@pytest.fixture
def hello(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the module `hello`; what is imported from it is forgotten afterwards."""
    (tmp_path / "hello.py").write_text(HELLO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def eventbus(hello: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Eventbus]:
    """`eventbus("run", "hello")` as the console script would do it."""
    saved = {name: value for name, value in os.environ.items() if not name.startswith(("EVENTBUS_", "OTEL_"))}
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(saved)
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["eventbus", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, said.out, said.err)

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)
    os.environ.clear()
    os.environ.update(before)
