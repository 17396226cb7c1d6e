"""`python -m services.shop`, which is `make shop`: every service a process of its own, on a RabbitMQ, until Ctrl-C.

Those who listen are started first, so that no event is published before the queues that want it exist. Only processes
that were started here are ever signalled; when one ends by itself, the others are ended too, and the exit code is 1.
"""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from eventbus import EventBusError, SetupError
from services.settings import Settings

LISTENERS = ("mailbox", "notifications", "marketing", "payments", "inventory", "shipping", "audit")
DOORS = ("users", "orders")
PORTS = {"users": 8001, "orders": 8002, "mailbox": 8025, "smtp": 1025}  # another free one where these are taken
START_S = 60.0
GRACE_S = 35.0  # a worker drains for 30 s
READY = re.compile(r"(^|\s)ready(:\s|$)")
LONGEST_LINE = 1 << 20  # bytes; a log line longer than this is a mistake


@dataclass
class Program:
    """One service at work, its output on ours with its name in front."""

    name: str
    process: asyncio.subprocess.Process
    console: Console
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self) -> None:
        """Until the process has ended."""
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.say(line)
            if READY.search(line):
                self.ready.set()
        await self.process.wait()

    def say(self, line: str) -> None:
        self.console.print(Text(f"{self.name:>13} | ", style="dim").append(line, style="default"))

    def send(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)


@dataclass
class Shop:
    """The processes, and what ends them."""

    console: Console
    environment: dict[str, str]
    ports: dict[str, int]
    programs: dict[asyncio.Task[None], Program] = field(default_factory=dict)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, names: Sequence[str]) -> None:
        """Start *names* and wait until each is ready.

        Raises:
            SetupError: one ended, or was not ready in time.
        """
        started = [await self._start(name) for name in names]
        await self._first_of(_all_set([program.ready for program in started]), timeout_s=START_S)
        late = [program.name for program in started if not program.ready.is_set()]
        if late and not self.stop.is_set():
            raise SetupError(self._ended() or f"{', '.join(late)} not ready after {START_S:g} s: see above")

    async def _start(self, name: str) -> Program:
        process = await asyncio.create_subprocess_exec(
            *command_of(name),
            env=self.environment | {"SHOP_HTTP_PORT": str(self.ports.get(name, 0))},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=LONGEST_LINE,
            start_new_session=True,  # Ctrl-C is ours alone: it would reach all of them, in no order
        )
        program = Program(name, process, self.console)
        program.say(f"process {process.pid}")
        self.programs[asyncio.create_task(program.follow(), name=name)] = program
        return program

    async def until_stopped(self) -> None:
        """Until a signal; raises when a service ends by itself."""
        await self._first_of(_all_set([self.stop]), timeout_s=None)
        if not self.stop.is_set():
            raise SetupError(self._ended() or "a service ended")

    async def _first_of(self, done: Coroutine[None, None, None], *, timeout_s: float | None) -> None:
        """Until *done*, a signal, or the end of a service."""
        waits = [asyncio.create_task(done), asyncio.create_task(_all_set([self.stop]))]
        await asyncio.wait((*waits, *self.programs), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _ended(self) -> str:
        ended = [program for task, program in self.programs.items() if task.done()]
        return "; ".join(f"{program.name} ended with exit code {program.process.returncode}" for program in ended)

    async def end(self, names: Sequence[str]) -> None:
        """SIGTERM, and SIGKILL for who is still there after the grace period."""
        mine = {task: program for task, program in self.programs.items() if program.name in names}
        for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 5.0)):
            running = [task for task in mine if not task.done()]
            for task in running:
                mine[task].send(number)
            if running:
                await asyncio.wait(running, timeout=patience_s)


async def _all_set(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


def describe(ports: dict[str, int]) -> str:
    users, orders, mailbox = (f"http://127.0.0.1:{ports[name]}" for name in ("users", "orders", "mailbox"))
    return f"""
  users    {users}/docs
  orders   {orders}/docs
  mailbox  {mailbox}/mails

  curl {users}/users -H 'Idempotency-Key: 1' --json '{{"name": "Ada", "email": "ada@example.com"}}'
  curl {orders}/orders --json '{{"order_id": "11111111-1111-4111-8111-111111111111", "email": "ada@example.com",
       "address": "1 Sample Street", "lines": [{{"sku": "mug", "quantity": 2, "unit_price": "12.30"}}]}}'
  curl {orders}/orders/11111111-1111-4111-8111-111111111111

  Ctrl-C ends the shop
"""


def choose_ports() -> dict[str, int]:
    """The usual ones where they are free."""
    return {name: port if _is_free(port) else _any_free() for name, port in PORTS.items()}


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _any_free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def command_of(name: str) -> tuple[str, ...]:
    """What one would type: services that only listen need no more than `eventbus run`."""
    module = f"services.{name}.main"
    if name in (*DOORS, "mailbox"):
        return sys.executable, "-m", module
    return str(Path(sys.executable).with_name("eventbus")), "run", f"{module}:service"


def environment_of(ports: dict[str, int]) -> dict[str, str]:
    """What every service is told.

    Raises:
        SetupError: there is no broker that processes can share.
    """
    url = os.environ.get("EVENTBUS_URL", "")
    if not url or url.startswith("memory:"):
        given = "memory:// is a broker inside one process" if url else "EVENTBUS_URL is not set"
        raise SetupError(f"{given}: the shop's processes need a RabbitMQ; `make broker` starts one and prints its URL")
    told = {
        "EVENTBUS_LOG": os.environ.get("EVENTBUS_LOG", "console"),  # for people, although the output is a pipe
        "SHOP_DATA": str(Settings().data.absolute()),
        "SHOP_HTTP_HOST": "127.0.0.1",
        "SHOP_SMTP_HOST": "127.0.0.1",
        "SHOP_SMTP_PORT": str(ports["smtp"]),
        "PYTHONUNBUFFERED": "1",
    }
    return dict(os.environ) | told


async def make_all_tables(environment: dict[str, str]) -> None:
    """Once, before anybody starts: the services themselves make none.

    Raises:
        SetupError: they could not be made; the command has said why.
    """
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.tables", env=environment)
    if await process.wait() != 0:
        raise SetupError("the services' tables could not be made: see above")


async def main(console: Console) -> None:
    ports = choose_ports()
    shop = Shop(console, environment_of(ports), ports)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, shop.stop.set)
    try:
        await make_all_tables(shop.environment)
        for names in (LISTENERS, DOORS):
            await shop.start(names)
        console.print(describe(ports), highlight=False, markup=False, soft_wrap=True)
        await shop.until_stopped()
    finally:
        await shop.end(DOORS)  # first: nothing new comes in while the others finish
        await shop.end(LISTENERS)


if __name__ == "__main__":
    try:
        asyncio.run(main(Console(soft_wrap=True)))
    except EventBusError as error:
        sys.exit(f"error: {error}")
