"""A log record as a line for people and as an object for collectors."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any  # whatever a record carries

import pytest
from opentelemetry.sdk.trace import TracerProvider

from eventbus.cli import logs

FACTS: dict[str, Any] = {"event_id": "e 1", "attempt": 2}


def record(message: str = "gave up on %s", **extra: Any) -> logging.LogRecord:
    return logging.getLogger("eventbus.delivery").makeRecord(
        "eventbus.delivery", logging.ERROR, "f.py", 1, message, ("it",) if "%s" in message else (), None, extra=extra
    )


def test_the_console_shows_a_line_with_its_facts() -> None:
    line = logs.ConsoleFormatter(colours=False).format(record(**FACTS))

    time, rest = line.split(" ", 1)
    assert len(time) == len("12:00:01.123")
    assert rest == "ERROR   eventbus.delivery  gave up on it  event_id='e 1'  attempt=2"


def test_the_console_keeps_a_record_on_its_line_whatever_is_in_it() -> None:
    line = logs.ConsoleFormatter(colours=False).format(record("a\nb\x1b[2J", note="c\rd"))

    assert line.endswith(r"a\nb\x1b[2J  note=c\rd")


def test_colours_only_where_they_are_wanted() -> None:
    assert "\x1b[31mERROR" in logs.ConsoleFormatter(colours=True).format(record())
    assert "\x1b" not in logs.ConsoleFormatter(colours=False).format(record())


def test_an_exception_follows_its_line() -> None:
    failed = record()
    try:
        raise ValueError("boom")
    except ValueError:
        failed.exc_info = sys.exc_info()

    lines = logs.ConsoleFormatter(colours=False).format(failed).splitlines()
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "ValueError: boom"
    assert "boom" in json.loads(logs.JsonLines().format(failed))["exception"]


def test_json_is_one_object_with_the_time_first() -> None:
    line = logs.JsonLines().format(record(**FACTS))

    found = json.loads(line)
    assert "\n" not in line
    assert next(iter(found)) == "time"
    assert found.pop("time").endswith("+00:00")
    assert found == {"level": "ERROR", "logger": "eventbus.delivery", "message": "gave up on it"} | FACTS


@pytest.mark.parametrize(("format", "begins"), [("json", "{"), ("console", ""), (None, "{")])
def test_logs_go_to_stderr_in_the_format_that_was_asked_for(
    format: str | None, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        logs.configure(format, "warning")  # type: ignore[arg-type]  # a parameter is a str
        logging.getLogger("some.handler").warning("hear, hear", extra=FACTS)
        logging.getLogger("some.handler").info("not this")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith(begins)
    assert "hear, hear" in said.err


def test_what_is_logged_in_a_span_carries_its_trace() -> None:
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("work") as span:
        inside, named = record(), record(trace_id="its own")
        assert logs._add_trace_id(inside)
        assert logs._add_trace_id(named)
    outside = record()
    logs._add_trace_id(outside)

    assert vars(inside)["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert vars(named)["trace_id"] == "its own"
    assert "trace_id" not in vars(outside)
