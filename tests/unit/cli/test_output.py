"""The end of the program: which exit code, and one line for each thing that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import NoReturn

import pytest
import typer

from eventbus import Envelope, SetupError, StoreError, TransportError
from eventbus.cli import output


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SetupError("one\ntwo"), 1, "error: one\nerror: two\n"),
        (TransportError("gone"), 1, "error: gone\n"),
        (StoreError("gone"), 1, "error: gone\n"),
        (output.WrongUsage("no"), 2, "error: no\n"),
        (typer.BadParameter("no"), 2, "error: Invalid value: no.\n"),
        (typer.BadParameter("no?"), 2, "error: Invalid value: no?\n"),
        (KeyError("x"), 1, "error: KeyError: 'x' (with --debug: where)\n"),
        (OSError("amqp://u:sesame@h/ is\nbad"), 1, "error: OSError: amqp://u:***@h/ is bad (with --debug: where)\n"),
        (ExceptionGroup("", [SetupError("a"), output.WrongUsage("b")]), 2, "error: a\nerror: b\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, ""),
    ],
)
def test_an_error_is_its_lines_and_its_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert output.exit_code(raising(error), debug=False) == code
    assert capsys.readouterr() == ("", said)


def test_what_a_command_returns_is_the_exit_code() -> None:
    assert output.exit_code(lambda: None, debug=False) == 0
    assert output.exit_code(lambda: 3, debug=False) == 3


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    output.exit_code(raising(KeyError("x")), debug=True)

    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Traceback")
    assert said[-1] == "error: KeyError: 'x'"


def test_what_would_move_the_cursor_is_spelled_out() -> None:
    assert output.printable("grün \x1b[31m\r\n\x9b\ud800") == r"grün \x1b[31m\r\n\x9b\ud800"


ENVELOPE = Envelope(
    id="1",
    source="/s",
    type="t.v1",
    time=datetime(2030, 1, 31, 12, tzinfo=UTC),
    extensions={"sequence": 7},
    data=b'{"a": 1}',
)


def test_an_envelope_is_shown_as_a_cloud_event_without_its_data_unless_asked() -> None:
    shown = output.cloud_event(ENVELOPE, with_data=False)

    assert shown == {
        "specversion": "1.0",
        "id": "1",
        "source": "/s",
        "type": "t.v1",
        "time": "2030-01-31T12:00:00Z",
        "datacontenttype": "application/json",
        "sequence": 7,
    }
    assert output.cloud_event(ENVELOPE, with_data=True) == shown | {"data": {"a": 1}}


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"[1]", {"x": [1]}),
        (b"text", {"x": "text"}),
        (b"", {"x": ""}),
        (b"\xff\xfe", {"x_base64": "//4="}),
        (b"[" * 100_000, {"x": "[" * 100_000}),
    ],
    ids=["json", "text", "empty", "binary", "deep"],
)
def test_whatever_the_data_are_they_can_be_shown(data: bytes, shown: dict[str, object]) -> None:
    assert output.json_data(data, "x") == shown
