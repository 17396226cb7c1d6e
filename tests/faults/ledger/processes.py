"""The programs of a cell as processes, and somebody who starts anew what has died, as a container engine would."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eventbus.settings import Settings

ANSWER_S = 60.0
LOOK_AGAIN_S = 0.1


def lane() -> str:
    """Which way events take in every program: the caller's EVENTBUS_LANE, as the bus itself reads it."""
    return Settings.load().lane


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however it went: its pipe to our standard input closes."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(eq=False)
class Program:
    """One program, life after life. It ends for good when it has ended with 0, or was stopped."""

    module: str
    arguments: Sequence[str]
    log: Path
    lives: int = 0
    is_wanted: bool = True
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        self.lives += 1
        self.is_wanted = True
        ours = {name: value for name, value in os.environ.items() if not name.startswith("EVENTBUS_")}
        ours["EVENTBUS_LANE"] = lane()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                env=ours | {"EVENTBUS_LOG": "console", "EVENTBUS_LOG_LEVEL": "info"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def has_ended(self) -> bool:
        """Whether it has done all that it had to do."""
        return self.process.poll() == 0

    def kill(self) -> None:
        """SIGKILL, which it must not have ended before; whoever looks after it starts it anew."""
        self.process.kill()
        code = self.process.wait(ANSWER_S)
        assert code == -signal.SIGKILL, f"it had ended before it was killed, with {code}"

    def freeze(self) -> None:
        """It keeps its connections, and does nothing until `thaw`."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def said(self, words: str) -> int:
        """How many lines of its log hold *words*."""
        return sum(words in line for line in self.log.read_text(errors="replace").splitlines())

    def log_tail(self) -> str:
        """The end of what it wrote to its standard error, for people."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    async def stop(self) -> None:
        """SIGTERM, and wait until it has ended; it is not started anew."""
        self.is_wanted = False
        self.process.terminate()
        await asyncio.to_thread(self.process.wait, ANSWER_S)
        self.close()

    async def ask(self, line: str, answer: str | None = None) -> None:
        """Write *line* to its standard input, and wait for *answer*."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n".encode())
        if answer is not None:
            async with asyncio.timeout(ANSWER_S):
                said = await asyncio.to_thread(self.process.stdout.readline)
            assert said == f"{answer}\n".encode(), said

    def discard(self) -> None:
        """End it, whatever it is doing."""
        self.is_wanted = False
        self.process.kill()
        self.process.wait(ANSWER_S)
        self.close()

    def close(self) -> None:
        """Let go of the pipes of a process that has ended."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


async def look_after(programs: Sequence[Program]) -> None:
    """Start each program anew that has died; never ends."""
    while True:
        for program in programs:
            if program.is_wanted and not program.is_running and not program.has_ended:
                program.close()
                program.start()
        await asyncio.sleep(LOOK_AGAIN_S)
