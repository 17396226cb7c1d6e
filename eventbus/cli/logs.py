"""The logs of `eventbus run`, on stderr: readable with `console`, an object a line with `json`.

Either way with what a record carries besides its message (event id, type, handler, attempt, trace id): never an
event's data, which no logger is given.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal  # Any: python-json-logger's own signature

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from eventbus.cli.output import printable

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_COLOURS = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


def configure(format: Literal["console", "json"] | None, level: str) -> None:
    """Send all logs to stderr. No *format*: console on a terminal, json elsewhere."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_trace_id)
    if (format or ("console" if sys.stderr.isatty() else "json")) == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(ConsoleFormatter(colours=sys.stderr.isatty() and not os.environ.get("NO_COLOR")))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


class ConsoleFormatter(logging.Formatter):
    """`12:00:01.123 WARNING eventbus.delivery  message  key=value`; exceptions below it."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        extras = "".join(f"  {self._paint('2', name)}={_value(value)}" for name, value in _extras(record).items())
        level = self._paint(_COLOURS.get(record.levelname, ""), f"{record.levelname:<7}")
        line = f"{self._paint('2', time)} {level} {record.name}  {printable(record.getMessage())}{extras}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + self.formatStack(record.stack_info)
        return line

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours and code else text


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and not name.startswith("_")}


def _value(value: object) -> str:
    text = printable(str(value))
    return repr(text) if " " in text or not text else text


class JsonLines(JsonFormatter):
    """One object a line, the time first."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            json_ensure_ascii=False,
        )

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        super().add_fields(log_data, record, message_dict)


def _add_trace_id(record: logging.LogRecord) -> bool:
    """A handler's own log lines belong to its trace as well."""
    span = trace.get_current_span().get_span_context()
    if span.is_valid and not hasattr(record, "trace_id"):
        record.trace_id = trace.format_trace_id(span.trace_id)
    return True
