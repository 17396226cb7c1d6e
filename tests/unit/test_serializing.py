"""What does not fit its field's type is refused, whatever the program does with warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from unittest import TestCase

import pytest
from pydantic import computed_field, field_serializer
from typing_extensions import deprecated

from eventbus import serializing
from eventbus.errors import EnvelopeError
from eventbus.event import Event, to_json


class Line(Event):
    quantity: int


class Ordered(Event):
    lines: list[Line]
    total: int = 0


class Deprecating(Event):
    total: int

    @computed_field  # type: ignore[prop-decorator]  # as pydantic has it
    @property
    @deprecated("ask for total")
    def sum(self) -> int:
        return self.total


class Muttering(Event):
    total: int

    @field_serializer("total")
    def write_total(self, total: int) -> int:
        warnings.warn("a total is written", stacklevel=2)
        return total


@pytest.fixture(params=["quick", "slow"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As it is here, and as it would be where Python or pydantic do otherwise."""
    if request.param == "slow":
        monkeypatch.setattr(serializing, "_WARNINGS", "error")
    with warnings.catch_warnings():
        yield


def unchecked(event_class: type[Event], **values: Any) -> Event:
    return event_class.model_construct(**values)


MISFITS = [
    unchecked(Ordered, lines=[], total="much"),
    unchecked(Ordered, lines=[unchecked(Line, quantity="many")]),
    unchecked(Ordered, lines="none"),
]


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("filtered", ["ignore", "always", "once", "error"])
@pytest.mark.parametrize("event", MISFITS, ids=repr)
def test_what_does_not_fit_is_refused_whatever_warnings_are_filtered(
    event: Event, filtered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings.simplefilter(filtered)

    for _ in range(2):  # no filter lets the second pass
        with pytest.raises(EnvelopeError, match="does not serialise"):
            to_json(event)

    assert capsys.readouterr().err == ""


def test_a_test_that_awaits_a_warning_changes_nothing() -> None:
    with TestCase().assertWarns(UserWarning):  # it empties what every module has noted
        warnings.warn("awaited", stacklevel=1)

    with warnings.catch_warnings(action="ignore"), pytest.raises(EnvelopeError, match="does not serialise"):
        to_json(MISFITS[0])


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("event", [Deprecating(total=3), Muttering(total=3)], ids=["deprecating", "muttering"])
def test_an_event_whose_serialiser_only_warns_is_written(event: Event) -> None:
    with pytest.warns(match=r"ask for total|a total is written"):
        assert to_json(event).startswith(b'{"total":3')


@pytest.mark.usefixtures("ways")
def test_what_fits_is_written_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert to_json(Ordered(lines=[Line(quantity=1)], total=2)) == b'{"lines":[{"quantity":1}],"total":2}'
    assert not list(recwarn)


def test_this_python_and_this_pydantic_refuse_warnings() -> None:
    assert serializing._WARNINGS is True


def test_that_they_do_not_is_noticed(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(serializing, "__warningregistry__", {})

    assert not serializing._are_warnings_refused()
    assert not list(recwarn)
