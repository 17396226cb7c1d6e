"""Where the management interface is taken to be, and what is no URL of one. What it answers: the acceptance tests."""

from __future__ import annotations

import pytest
from yarl import URL

from eventbus import SetupError
from eventbus.transport.rabbitmq.management import Management, NotTold, management_url


@pytest.mark.parametrize(
    ("amqp", "guessed"),
    [
        ("amqp://u:p@broker/", "http://broker:15672"),
        ("amqp://u:p@broker:5673/vhost", "http://broker:15672"),
        ("amqps://u:p@broker/", "https://broker:15671"),  # a password that went encrypted goes so here, too
        ("amqp://[::1]/", "http://[::1]:15672"),
    ],
)
def test_it_is_guessed_from_the_brokers_url(amqp: str, guessed: str) -> None:
    assert str(management_url(URL(amqp))) == guessed


@pytest.mark.parametrize("url", ["broker:15672", "amqp://u:sesame@broker/", "http://", "http://u:sesame@broker:port/"])
def test_what_is_no_url_of_one_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SetupError, match="no URL of a management interface") as refused:
        Management("amqp://broker/", url)

    assert "sesame" not in str(refused.value)


def test_one_that_does_not_answer_is_named_without_its_login() -> None:
    management = Management("amqp://u:sesame@127.0.0.1/", "http://127.0.0.1:1/")

    with pytest.raises(NotTold, match=r"no management interface answers at http://127\.0\.0\.1:1 ") as refused:
        management.queues()

    assert "sesame" not in str(refused.value)
