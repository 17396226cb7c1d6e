"""What the broker says becomes one line that names the thing and the remedy."""

from __future__ import annotations

import socket
import ssl

import aiormq
import pytest
from yarl import URL

from eventbus.errors import SetupError, TopologyConflict, TransportError
from eventbus.transport.rabbitmq.refusals import (
    Address,
    LoginRefused,
    Missing,
    Unreachable,
    not_allowed,
    not_connected,
)

ADDRESS = Address.of(URL("amqp://ada:secret@rabbit.example/shop"))


def caused_by(cause: Exception) -> aiormq.AMQPConnectionError:
    error = aiormq.AMQPConnectionError(*cause.args)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("url", "shown", "user", "vhost"),
    [
        ("amqp://h", "h:5672", "guest", "/"),
        ("amqps://h/", "h:5671", "guest", "/"),
        ("amqp://u:p@h:1234/v", "h:1234", "u", "v"),
        ("amqp://u:p@h/%2F", "h:5672", "u", "/"),
        ("amqp://u:p@h/a%20b", "h:5672", "u", "a b"),
    ],
)
def test_an_address_is_what_a_person_may_read_of_a_url(url: str, shown: str, user: str, vhost: str) -> None:
    address = Address.of(URL(url))

    assert (str(address), address.user, address.vhost) == (shown, user, vhost)


@pytest.mark.parametrize(
    ("error", "close_text", "kind", "says"),
    [
        (aiormq.ProbableAuthenticationError("ACCESS_REFUSED"), "ACCESS_REFUSED", LoginRefused, "login of user 'ada'"),
        (aiormq.AuthenticationError("PLAIN", ["EXTERNAL"]), None, SetupError, "PLAIN are offered"),
        (
            aiormq.InvalidFrameError(""),
            "NOT_ALLOWED - vhost shop not found",
            SetupError,
            "no virtual host 'shop' at rabbit.example:5672.*add_vhost shop",
        ),
        (
            aiormq.InvalidFrameError(""),
            "NOT_ALLOWED - access to vhost 'shop' refused for user 'ada'",
            SetupError,
            "user 'ada' has no access to the virtual host 'shop'.*set_permissions",
        ),
        (
            aiormq.InvalidFrameError(""),
            "NOT_ALLOWED - access to vhost 'shop' refused for user 'ada': connection limit (1) is reached",
            Unreachable,
            "connection limit",
        ),
        (aiormq.InvalidFrameError(""), "NOT_ALLOWED - access to vhost 'shop' refused: vhost 'shop' is down",
         Unreachable, "is down"),
        (aiormq.ProtocolSyntaxError("Unexpected AMQP protocol header"), None, TransportError, "not AMQP 0-9-1"),
        (caused_by(ConnectionRefusedError(111, "Connect call failed")), None, Unreachable, "Connect call failed"),
        (caused_by(socket.gaierror(-2, "Name or service not known")), None, TransportError, "'rabbit.example' is"),
        (caused_by(ssl.SSLError(1, "wrong version number")), None, SetupError, "does not speak TLS"),
        (TimeoutError(), None, Unreachable, "no answer"),
    ],
)  # fmt: skip
def test_why_there_is_no_connection(error: Exception, close_text: str | None, kind: type[Exception], says: str) -> None:
    refusal = not_connected(error, ADDRESS, close_text)

    assert type(refusal) is kind
    with pytest.raises(kind, match=says):
        raise refusal
    assert "secret" not in str(refusal)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            aiormq.ChannelPreconditionFailed(
                "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'events.a' in vhost '/': "
                "received '200' but current is '300'"
            ),
            TopologyConflict,
            r"queue 'events\.a' exists with another 'x-message-ttl': the broker holds '300', the bus wants '200'",
        ),
        (
            aiormq.ChannelPreconditionFailed(
                "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q' in vhost 'v': "
                "received the value '100' of type 'signedint' but current is none"
            ),
            TopologyConflict,
            "the broker holds none, the bus wants '100'",
        ),
        (
            aiormq.ChannelPreconditionFailed(
                "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'events' in vhost '/': "
                "received 'topic' but current is 'direct'"
            ),
            TopologyConflict,
            "the exchange 'events' exists with another 'type'.*Use another namespace, or drain and delete",
        ),
        (
            aiormq.ChannelPreconditionFailed("PRECONDITION_FAILED - invalid arg 'x-max' for queue 'q'"),
            SetupError,
            "invalid arg",
        ),
        (
            aiormq.ChannelAccessRefused("ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'ada'"),
            SetupError,
            "access to queue 'q'.*give 'ada' the permission .rabbitmqctl set_permissions.",
        ),
        (
            aiormq.ChannelNotFoundEntity("NOT_FOUND - no queue 'q' in vhost '/'"),
            Missing,
            "no queue 'q'.*is that its name.*eventbus topology apply",
        ),
        (aiormq.ChannelLockedResource("RESOURCE_LOCKED - cannot obtain"), TransportError, "RESOURCE_LOCKED"),
    ],
)
def test_why_something_is_not_allowed(error: aiormq.ChannelClosed, kind: type[Exception], says: str) -> None:
    refusal = not_allowed(error, "ada")

    assert type(refusal) is kind
    with pytest.raises(kind, match=says):
        raise refusal
