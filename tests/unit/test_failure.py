"""What a failure says: as Python says it, cut to what a header holds, and without what pydantic would quote."""

from __future__ import annotations

from pydantic import BaseModel

from eventbus.failure import LONGEST_ERROR, failure_of, one_line, text_of


def test_a_trace_is_told_as_python_tells_it() -> None:
    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    try:
        fail()
    except ValueError as error:
        trace = failure_of(error).trace

    lines = [line for line in trace.splitlines() if not line.startswith(" ")]
    assert lines == [
        "Traceback (most recent call last):",
        "KeyError: 'first'",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        "ValueError: second",
    ]


def test_errors_that_cause_each_other_are_told_once() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one

    assert failure_of(one).trace.count("ValueError: one") == 1


def test_a_validation_error_is_told_by_model_and_kind_only() -> None:
    class Card(BaseModel):
        number: int

    told = "4111 " * 2  # not as it stands in this line, which the trace shows
    try:
        Card.model_validate({"number": told})
    except ValueError as error:
        failure = failure_of(error)

    assert failure.error == "ValidationError of Card: int_parsing"
    assert failure.kind == "ValidationError"
    assert told not in failure.trace


def test_a_text_becomes_one_line_of_bounded_length() -> None:
    assert one_line(" two\n lines\t") == "two lines"
    assert len(one_line("é" * LONGEST_ERROR).encode()) <= LONGEST_ERROR


def test_an_error_that_cannot_say_itself_is_told_all_the_same() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert text_of(Broken()) == "(its text cannot be had)"
