"""The `eventbus` program as a person or a script runs it: a process of its own, with what it printed and its exit code.

It sees none of the `EVENTBUS_*`, `OTEL_*` and colour variables of whoever runs the tests.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

EVENTBUS = str(Path(sys.executable).parent / "eventbus")
DEADLINE_S = 60.0  # generous: the machine may be busy, and nothing waits longer than it must
LOOK_AGAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Done:
    """How a program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # Any: whatever JSON it printed
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Its one line on stderr, an error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    ours = ("EVENTBUS_", "OTEL_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | dict(extra)


def eventbus(*words: str, cwd: Path, stdin: str = "", **variables: str) -> Done:
    """Run `eventbus WORDS` to its end."""
    done = subprocess.run(
        [EVENTBUS, *words],
        cwd=cwd,
        input=stdin,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@dataclass
class Program:
    """A program at work. What it has printed so far is in `out` and `err`."""

    process: subprocess.Popen[str]
    _said: dict[str, list[str]] = field(default_factory=lambda: {"out": [], "err": []})
    _readers: list[threading.Thread] = field(default_factory=list)

    def read(self) -> None:
        for name, stream in (("out", self.process.stdout), ("err", self.process.stderr)):
            if stream is not None:
                reader = threading.Thread(target=self._collect, args=(name, stream), daemon=True)
                reader.start()
                self._readers.append(reader)

    def _collect(self, name: str, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._said[name].append(line)

    @property
    def out(self) -> str:
        return "".join(self._said["out"])

    @property
    def err(self) -> str:
        return "".join(self._said["err"])

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until it has printed *text*, on either stream."""
        deadline = time.monotonic() + DEADLINE_S
        while (self.out + self.err).count(text) < times:
            assert self.process.poll() is None, f"it ended before it said {text!r}: {self.out}{self.err}"
            assert time.monotonic() < deadline, f"it never said {text!r}: {self.out}{self.err}"
            time.sleep(LOOK_AGAIN_S)

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, number: int | None = signal.SIGTERM) -> Done:
        """Send it a signal, and wait for its end."""
        if number is not None:
            self.send(number)
        code = self.process.wait(DEADLINE_S)
        for reader in self._readers:
            reader.join(DEADLINE_S)
        return Done(code, self.out, self.err)


@contextlib.contextmanager
def running(*words: str, cwd: Path, wait_for: str | None = None, **variables: str) -> Iterator[Program]:
    """`eventbus WORDS` while the block is at work; it is killed if it is still there afterwards."""
    process = subprocess.Popen(
        [EVENTBUS, *words],
        cwd=cwd,
        env=environment({"PYTHONUNBUFFERED": "1"} | variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    program = Program(process)
    program.read()
    try:
        if wait_for is not None:
            program.wait_for(wait_for)
        yield program
    finally:
        if process.poll() is None:
            process.kill()
        program.end(None)


def on_a_terminal(*words: str, cwd: Path, answers: Mapping[str, str] | None = None, **variables: str) -> Done:
    """Run `eventbus WORDS` on a terminal; *answers*: what is typed when a text has appeared. `out` has both streams."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [EVENTBUS, *words],
        cwd=cwd,
        env=environment({"TERM": "xterm-256color", "COLUMNS": "200"} | variables),
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    watchdog = threading.Timer(DEADLINE_S, process.kill)
    watchdog.start()
    waiting = dict(answers or {})
    said = b""
    try:
        while chunk := _read(ours):
            said += chunk
            for question in [text for text in waiting if text.encode() in said]:
                os.write(ours, waiting.pop(question).encode())
        return Done(process.wait(DEADLINE_S), said.decode().replace("\r\n", "\n"), "")
    finally:
        watchdog.cancel()
        os.close(ours)
        process.kill()
        process.wait()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError as error:  # Linux says so when the last process that had the terminal is gone
        if error.errno != errno.EIO:
            raise
        return b""
