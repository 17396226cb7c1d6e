"""A URL is taken or refused before anything is connected, and its password is never shown."""

from __future__ import annotations

import pytest

from eventbus.errors import SetupError
from eventbus.transport.rabbitmq import RabbitMQ


@pytest.mark.parametrize("url", ["amqp://h", "amqps://u:p@h:1/v?cafile=ca.pem", "amqp://u:p%2F%40@h/%2F?heartbeat=5"])
def test_a_good_url_is_taken(url: str) -> None:
    RabbitMQ(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://u:hidden@h/", "no URL of a RabbitMQ"),
        ("amqp:///v", "no URL of a RabbitMQ"),
        ("", "no URL of a RabbitMQ"),
        ("amqp://u:hidden/x@h/", "no URL.*%2F"),
        ("amqp://u:hidden@h:port/", "no URL"),
        ("amqps://u:hidden@h/?no_verify_ssl=1", "turns certificate checks off.*cafile"),
    ],
)
def test_a_bad_url_is_refused_with_the_remedy(url: str, says: str) -> None:
    with pytest.raises(SetupError, match=says) as caught:
        RabbitMQ(url)

    assert "hidden" not in str(caught.value)


def test_who_answers_is_not_known_before() -> None:
    with pytest.raises(RuntimeError, match="after open"):
        _ = RabbitMQ("amqp://h").broker
