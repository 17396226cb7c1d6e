"""The tree of errors, their facts, and passwords that must not be printed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import errors
from eventbus.envelope import Envelope
from eventbus.errors import (
    EnvelopeError,
    EventBusError,
    PartlyPublished,
    PublishError,
    PublishTimeout,
    Reject,
    RetryLater,
    SetupError,
    StoreError,
    TopologyConflict,
    TransportError,
    Unroutable,
    hide_password,
)

ENVELOPE = Envelope(id="1", source="/s", type="t", time=datetime(2030, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (EnvelopeError, EventBusError),
        (TransportError, EventBusError),
        (PublishError, TransportError),
        (PublishTimeout, PublishError),
        (Unroutable, PublishError),
        (PartlyPublished, TransportError),
        (StoreError, EventBusError),
        (SetupError, EventBusError),
        (TopologyConflict, SetupError),
        (EventBusError, Exception),
        (Reject, Exception),
        (RetryLater, Exception),
    ],
)
def test_the_tree_is_as_drawn(error: type[Exception], parent: type[Exception]) -> None:
    assert error.__bases__ == (parent,)
    assert error.__name__ in (errors.__doc__ or "")


def test_every_error_is_in_the_tree() -> None:
    raised = {name for name in vars(errors) if isinstance(vars(errors)[name], type) and name in errors.__all__}

    assert raised == set(errors.__all__) - {"hide_password"}


def test_control_flow_of_a_handler_is_not_caught_with_the_errors() -> None:
    assert not issubclass(Reject, EventBusError)
    assert not issubclass(RetryLater, EventBusError)


@pytest.mark.parametrize("kind", [PublishError, PublishTimeout, Unroutable])
def test_a_publish_error_brings_the_envelope_back(kind: type[PublishError]) -> None:
    error = kind("no confirm", envelope=ENVELOPE, maybe_stored=True)

    assert (str(error), error.envelope, error.maybe_stored) == ("no confirm", ENVELOPE, True)


def test_partly_published_tells_which() -> None:
    failure = PublishError("no", envelope=ENVELOPE, maybe_stored=False)

    error = PartlyPublished("1 of 2", published=[ENVELOPE], failed=[failure])

    assert (error.published, error.failed) == ([ENVELOPE], [failure])


def test_an_envelope_error_has_its_reason() -> None:
    assert EnvelopeError("x").reason == "invalid-envelope"
    assert EnvelopeError("x", reason="invalid-data").reason == "invalid-data"


def test_retry_later_says_when_and_why() -> None:
    assert str(RetryLater(timedelta(minutes=1))) == "again in 0:01:00"
    assert str(RetryLater(timedelta(0), "busy")) == "busy"
    with pytest.raises(ValueError, match="past"):
        RetryLater(timedelta(seconds=-1))
    with pytest.raises(TypeError, match=r"RetryLater\(5\) is no timedelta"):
        RetryLater(5)  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://user:secret@host:5672/vhost", "amqp://user:***@host:5672/vhost"),
        ("amqp://user:se@cr/et@host/", "amqp://user:***@host/"),
        ("redis://:secret@host/0", "redis://:***@host/0"),
        ("amqp://user@host/", "amqp://user@host/"),
        ("amqp://host/", "amqp://host/"),
        ("memory://", "memory://"),
        ("cannot reach amqp://a:b@host/ or amqp://c:d@host/", "cannot reach amqp://a:***@host/ or amqp://c:***@host/"),
    ],
)
def test_passwords_are_three_stars(url: str, shown: str) -> None:
    assert hide_password(url) == shown


@given(
    st.text(st.characters(exclude_categories=["Z", "C"]), min_size=4).filter(lambda password: password.strip("*:@/")),
    st.sampled_from(["host", "host:5672/vhost", "[::1]/"]),
)
def test_no_part_of_a_password_is_shown(password: str, rest: str) -> None:
    assert hide_password(f"amqp://user:{password}@{rest}") == f"amqp://user:***@{rest}"
