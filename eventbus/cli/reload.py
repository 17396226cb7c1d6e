"""`eventbus run --reload`: the same command in a child process, anew with each change.

A child that ends by itself (a mistake in the code, for instance) is not started again until something changes.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

from watchfiles import PythonFilter, watch

from eventbus.cli import output

# After the grace period a child only has to say goodbye to the broker.
GOODBYE_S = 10.0
LOOK_AGAIN_MS = 500  # how soon a child that ended by itself is noticed


def run_and_reload(*, grace_s: float) -> int:
    """Run this command without `--reload` until a signal comes; return what its last child ended with."""
    command = [sys.executable, *(word for word in sys.argv if word != "--reload")]
    child = _Child(command, patience_s=grace_s + GOODBYE_S)
    stopping = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stopping.set()
        # A terminal gives Ctrl-C to the child as well; given twice it would mean "hurry".
        if number == signal.SIGTERM or not sys.stdin.isatty():
            child.ask_to_stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    child.start()
    here = Path.cwd()
    changes = watch(
        here,
        watch_filter=PythonFilter(extra_extensions=(".env",)),
        stop_event=stopping,
        rust_timeout=LOOK_AGAIN_MS,
        yield_on_timeout=True,
        raise_interrupt=False,
    )
    for change in changes:
        if change and not stopping.is_set():
            output.note(f"{_names(here, [path for _, path in change])} changed: starting again")
            child.stop()
            if not stopping.is_set():
                child.start()
        child.say_if_ended()
    return child.wait()


def _names(here: Path, paths: list[str]) -> str:
    names = sorted(str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path for path in paths)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class _Child:
    """The process that runs the services."""

    def __init__(self, command: list[str], *, patience_s: float) -> None:
        self._command = command
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._is_said = False

    def start(self) -> None:
        self._is_said = False
        self._process = subprocess.Popen(self._command)  # noqa: S603  # the words that this process was started with

    def ask_to_stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Ask, and end it if it does not."""
        self.ask_to_stop()
        self.wait()

    def wait(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def say_if_ended(self) -> None:
        if not self._is_said and self._process is not None and self._process.poll() is not None:
            self._is_said = True
            output.note(f"ended with exit code {self._process.returncode}: waiting for a change")
