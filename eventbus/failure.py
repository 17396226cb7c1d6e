"""What a failure says of itself, in logs, headers and dead letters: enough to find it, and never an event's data.

A handler's own words are passed on as they are. pydantic's are not: a ValidationError quotes what it was given.
"""

from __future__ import annotations

import traceback
from types import TracebackType

from pydantic import ValidationError

from eventbus.delivery import Failed

LONGEST_ERROR = 1024
LONGEST_TRACE = 8 * 1024  # all headers of a message travel in one frame, which cannot be split
_RUNS_HANDLERS = "eventbus.consumer"  # its frames tell nobody anything


def failure_of(error: BaseException, described: str | None = None) -> Failed:
    """The failure that *error* is, told without the data that a ValidationError would show."""
    trace = _innermost(_trace(error))
    return Failed(described or described_as(error), trace, kind=type(error).__name__)


def _trace(error: BaseException) -> str:
    """As Python prints it, what came first first."""
    told: list[str] = []
    seen: set[int] = set()
    below: BaseException | None = error
    link = ""
    while below is not None and id(below) not in seen:
        seen.add(id(below))
        told.append(_trace_of_one(below) + link)
        if below.__cause__ is not None:
            below, link = below.__cause__, "\nThe above exception was the direct cause of the following exception:\n\n"
        else:
            below = None if below.__suppress_context__ else below.__context__
            link = "\nDuring handling of the above exception, another exception occurred:\n\n"
    return "".join(reversed(told))


def _trace_of_one(error: BaseException) -> str:
    frames = traceback.format_tb(_without_ours(error.__traceback__))
    shows_data = isinstance(error, ValidationError)
    said = [f"{described_as(error)}\n"] if shows_data else traceback.format_exception_only(error)
    inner = [_trace(e) for e in error.exceptions] if isinstance(error, BaseExceptionGroup) else []
    return "".join(["Traceback (most recent call last):\n", *frames, *said, *inner])


def _without_ours(frames: TracebackType | None) -> TracebackType | None:
    """The frames from the handler on."""
    theirs = frames
    while theirs is not None and theirs.tb_frame.f_globals.get("__name__") == _RUNS_HANDLERS:
        theirs = theirs.tb_next
    return theirs or frames


def described_as(error: BaseException) -> str:
    """The error in one line."""
    name = type(error).__name__
    if isinstance(error, ValidationError):
        # Not its places: a dictionary's keys are data too.
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        return f"{name} of {error.title}: {', '.join(dict.fromkeys(problem['type'] for problem in problems))}"
    text = text_of(error)
    if isinstance(error, BaseExceptionGroup):
        text = f"{text}: {'; '.join(described_as(inner) for inner in error.exceptions[:3])}"
    return f"{name}: {text}" if text else name


def text_of(error: BaseException) -> str:
    """What *error* says, whatever it does when it is asked."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # a handler's own class of error may have a bug
        return "(its text cannot be had)"


def one_line(text: str) -> str:
    """*text* in one line of at most `LONGEST_ERROR` bytes."""
    encoded = " ".join(text.split()).encode(errors="replace")
    return (
        encoded.decode()
        if len(encoded) <= LONGEST_ERROR
        else encoded[: LONGEST_ERROR - 3].decode(errors="ignore") + "..."
    )


def _innermost(trace: str) -> str:
    encoded = trace.encode(errors="replace")
    if len(encoded) <= LONGEST_TRACE:
        return encoded.decode()
    return "..." + encoded[3 - LONGEST_TRACE :].decode(errors="ignore")
