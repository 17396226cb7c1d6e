"""What a refusal of the broker means, and what to do about it, in one line for a person.

Cut by who must act: a `SetupError` cannot work until somebody changes something; a `TransportError` may work later.
"""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass

import aiormq
from yarl import URL

from eventbus.errors import SetupError, TopologyConflict, TransportError


class Unreachable(TransportError):
    """Nobody answers, or not yet."""


class LoginRefused(SetupError):
    """User or password is wrong; or the broker is only just starting and does not know its users yet."""


class Missing(SetupError):
    """A queue or an exchange that should exist does not."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the broker is, as a person may read it: no password."""

    host: str
    port: int
    user: str
    vhost: str
    is_tls: bool

    @classmethod
    def of(cls, url: URL) -> Address:
        is_tls = url.scheme == "amqps"
        return cls(
            host=url.host or "localhost",
            port=url.port or (5671 if is_tls else 5672),
            user=url.user or "guest",
            vhost=url.path[1:].replace("%2F", "/") or "/",
            is_tls=is_tls,
        )

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def not_connected(error: BaseException, address: Address, close_text: str | None) -> SetupError | TransportError:
    """Why no connection came about; *close_text* is what the broker said when it hung up, if it did."""
    cause = error.__cause__
    if isinstance(error, aiormq.ProbableAuthenticationError):
        return LoginRefused(
            f"RabbitMQ at {address} refuses the login of user '{address.user}': check the user name and the password "
            "in the URL (and 'guest' may only log in from the broker's own host)"
        )
    if isinstance(error, aiormq.AuthenticationError):
        return SetupError(f"RabbitMQ at {address} does not offer this way to log in: {error.args[0]} are offered")
    if close_text is not None:
        return _not_opened(close_text, address)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return SetupError(f"the certificate of {address} is not trusted: {cause.verify_message}. Give ?cafile=PATH")
    if isinstance(cause, ssl.SSLError):
        return SetupError(
            f"{address} does not speak TLS ({_first_line(cause)}): use amqp:// there, or the port for amqps://, "
            "usually 5671"
        )
    if isinstance(cause, socket.gaierror):
        return TransportError(f"the host '{address.host}' is unknown: {cause.strerror}")
    if isinstance(error, aiormq.ProtocolSyntaxError):
        return TransportError(f"what answers at {address} is not AMQP 0-9-1: is this the broker's port?")
    if isinstance(error, OSError | aiormq.AMQPError | TimeoutError):
        return Unreachable(_first_line(cause if isinstance(cause, OSError) else error) or "no answer")
    raise error


def _not_opened(text: str, address: Address) -> SetupError | TransportError:
    if "not found" in text:
        return SetupError(
            f"there is no virtual host '{address.vhost}' at {address}: correct the URL, or create it "
            f"(rabbitmqctl add_vhost {address.vhost})"
        )
    if "refused" in text and "limit" not in text and "down" not in text:
        return SetupError(
            f"user '{address.user}' has no access to the virtual host '{address.vhost}' at {address}: give it "
            f"permissions (rabbitmqctl set_permissions -p {address.vhost} {address.user} ...)"
        )
    return Unreachable(text)


def not_allowed(error: aiormq.ChannelClosed, user: str) -> SetupError | TransportError:
    """Why a declaration or a consumer was refused."""
    text = _text(error)
    if isinstance(error, aiormq.ChannelAccessRefused):
        return SetupError(
            f"{text}: give '{user}' the permission (rabbitmqctl set_permissions), or let a user who has it declare the "
            "topology first (eventbus topology apply)"
        )
    if isinstance(error, aiormq.ChannelPreconditionFailed) and (conflict := _conflict(text)):
        return conflict
    if isinstance(error, aiormq.ChannelPreconditionFailed):
        return SetupError(text)
    if (isinstance(error, aiormq.ChannelNotFoundEntity) and "no queue" in text) or "no exchange" in text:
        return Missing(
            f"{text}: is that its name? If so, declare it first (eventbus topology apply, or EVENTBUS_DECLARE=apply)"
        )
    return TransportError(text)


def _conflict(text: str) -> TopologyConflict | None:
    """Both sides of a 406, e.g. `inequivalent arg 'x-message-ttl' for queue 'q' in vhost '/': received ... but current
    is ...`."""
    found = re.search(r"inequivalent arg '(.+?)' for (queue|exchange) '(.+?)' in vhost '.*?': (.*)", text)
    if found is None:
        return None
    argument, kind, name, sides = found.groups()
    ours, _, theirs = sides.removeprefix("received ").partition(" but current is ")
    return TopologyConflict(
        f"the {kind} '{name}' exists with another '{argument}': the broker holds {_plain(theirs)}, the bus wants "
        f"{_plain(ours)}. Use another namespace, or drain and delete that {kind}, and start again"
    )


def _plain(side: str) -> str:
    return re.sub(r"^the value (.*?)( of type '.*')?$", r"\1", side)


def _text(error: aiormq.AMQPError) -> str:
    return str(error.args[-1] if error.args else error)


def _first_line(error: BaseException) -> str:
    return str(error.args[-1] if error.args else error).split("\n", 1)[0]
