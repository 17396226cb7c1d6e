"""What a person sees: a story line per event, and on a terminal a table of the services that keeps itself up to date.

For the eyes only. No figure that the demo is judged by comes from here, but for the number of failed attempts, which is
compared with what the mail server says.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.demo.ledger import PUBLISHERS, WANTED

ROWS = ("users", "orders", "payments", "inventory", "shipping", "notifications", "marketing", "audit")


class View:
    """Lines, one below the other; a context manager that shows the table below them where it is a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.published: Counter[str] = Counter()  # by service, as all of these
        self.handled: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.dead: Counter[str] = Counter()
        self._began_s = time.monotonic()
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._live.is_started:
            self._live.stop()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def say(self, line: str, style: str = "", *, mark: str = " ") -> None:
        self.show(Text.assemble((f"{self.elapsed_s:6.2f} s ", "dim"), (f"{mark} {line}", style)))

    def show(self, what: RenderableType = "") -> None:
        # soft_wrap: where it is no terminal, a line is a line however long.
        self.console.print(what, soft_wrap=not self.console.is_terminal, markup=False, highlight=False)

    def count_published(self, event: str) -> None:
        self.published[PUBLISHERS.get(event, event)] += 1

    def _table(self) -> Table:
        table = Table(box=SIMPLE)
        table.add_column("service")
        for column in ("published", "handled", "retried", "dead"):
            table.add_column(column, justify="right", min_width=9)
        for service in ROWS:
            columns = ((self.published, ""), (self.handled, "green"), (self.retried, "yellow"), (self.dead, "red"))
            cells = ((counter[service], style) for counter, style in columns)
            table.add_row(service, *(Text(str(count or "."), style if count else "dim") for count, style in cells))
        return table


class Story(logging.Handler):
    """Turns the bus's structured log into lines: one per event, once all who want it have settled it.

    What went wrong is told at once. *name* says what an event is about, by its id.
    """

    def __init__(self, view: View, name: Callable[[str], str]) -> None:
        super().__init__(logging.DEBUG)
        self.failed_attempts = 0
        self._view = view
        self._name = name
        self._settled: dict[str, dict[str, str]] = defaultdict(dict)  # by event id: handler -> how it went
        self._known: dict[str, list[str]] = defaultdict(list)  # by event id: handlers that had handled it before

    def attach(self) -> None:
        """Listen to the deliveries; warnings of everything else become lines as well."""
        deliveries = logging.getLogger("eventbus.delivery")
        deliveries.setLevel(logging.DEBUG)
        deliveries.propagate = False
        deliveries.addHandler(self)
        logging.getLogger().addHandler(_Warnings(self._view))

    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] = record.__dict__
        if "event_id" not in facts or "handler" not in facts:
            self._view.say(record.getMessage(), "red", mark="!")
            return
        event_id, event = facts["event_id"], facts["event_type"].rpartition(".v")[0]
        service, handler = facts["service"], f"{facts['service']}.{facts['handler']}"
        subject = f"{event}  {self._name(event_id)}"
        match facts["outcome"]:
            case "handled":
                self._view.handled[service] += 1
                attempt = f", attempt {facts['attempt']}" if facts["attempt"] > 1 else ""
                self._settle(event, event_id, handler, f"{facts['duration_s'] * 1000:.0f} ms{attempt}")
            case "retry":
                self.failed_attempts += 1
                self._view.retried[service] += 1
                due = f"attempt {facts['attempt']} failed, next in {facts['due_in_s']:.2g} s"
                self._view.say(f"{subject}  {handler}: {due}: {facts['error']}", "yellow", mark="~")
            case "dead-lettered":
                self._view.dead[service] += 1
                why = f"given up after attempt {facts['attempt']}, {facts['reason']}"
                self._view.say(f"{subject}  {handler}: {why}: {facts['error']}", "red", mark="x")
                self._settle(event, event_id, handler, facts["reason"])
            case "duplicate":
                self._recognise(event, event_id, handler)
            case _:
                self._view.say(f"{subject}  {record.getMessage()}", "yellow", mark="!")

    def _settle(self, event: str, event_id: str, handler: str, how: str) -> None:
        settled = self._settled[event_id]
        settled[handler] = how
        if len(settled) >= len(WANTED.get(event, ())):
            del self._settled[event_id]
            told = "  ".join(f"{_short(handler)} {how}" for handler, how in settled.items())
            self._view.say(f"{event}  {self._name(event_id)}  by {PUBLISHERS.get(event, '?')}: {told}", mark="+")

    def _recognise(self, event: str, event_id: str, handler: str) -> None:
        known = self._known[event_id]
        known.append(handler)
        if len(known) >= len(WANTED.get(event, ())):
            del self._known[event_id]
            told = ", ".join(map(_short, known))
            self._view.say(f"{event}  {self._name(event_id)}  a duplicate, handled before by {told}", "cyan", mark="=")


def _short(handler: str) -> str:
    return handler.partition(".")[0]


class _Warnings(logging.Handler):
    """Whatever else complains, in a line of its own."""

    def __init__(self, view: View) -> None:
        super().__init__(logging.WARNING)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        self._view.say(f"{record.name}: {record.getMessage()}", "red", mark="!")
