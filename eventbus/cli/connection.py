"""Which broker a command talks to: `--url`, else EVENTBUS_URL, else `.env` in the working directory."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar  # Any: what a coroutine is sent, which nobody does

import typer

from eventbus.errors import SetupError

if TYPE_CHECKING:
    from eventbus.settings import Settings
    from eventbus.topology import Names, Topology
    from eventbus.transport.base import Declare, Transport
    from eventbus.transport.rabbitmq.management import Management

T = TypeVar("T")

DOTENV = Path(".env")
# What of `.env` is this program's to read. The rest is the services' own business.
_OURS = ("EVENTBUS_", "OTEL_")

Url = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="The broker: amqp://user:password@host/ (EVENTBUS_URL)")
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", metavar="NAME", help="What its queues' names begin with (events)")
]
Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="Where the outbox is: postgresql://user:password@host/database or sqlite:///path (EVENTBUS_DATABASE)",
    ),
]
ManagementUrl = Annotated[
    str | None,
    typer.Option(
        "--management",
        metavar="URL",
        help="The broker's management interface (EVENTBUS_MANAGEMENT_URL); without it port 15672 of the broker's host, "
        "for amqps:// https and 15671. The login is the broker's, unless this URL has one.",
    ),
]


@dataclass(frozen=True, slots=True)
class Place:
    """A namespace on a broker, and what the environment says besides."""

    url: str
    names: Names
    settings: Settings


def read_settings() -> Settings:
    """The environment, and `.env` for what it does not say.

    Raises:
        SetupError: one line for each mistake.
    """
    from dotenv import dotenv_values

    from eventbus.settings import Settings

    settings = Settings.load(DOTENV)
    # The library reads the environment again, wherever a Bus is made: in a service's lifespan, for example.
    for name, value in dotenv_values(DOTENV, encoding="utf-8").items():
        if name.upper().startswith(_OURS) and value and not os.environ.get(name.upper()):
            os.environ[name.upper()] = value
    return settings


def broker_url(url: str | None, settings: Settings) -> str:
    """*url*, or what the environment says.

    Raises:
        SetupError: nobody says.
    """
    found = url or settings.url
    if found is None:
        raise SetupError(
            "no broker: give --url amqp://USER:PASSWORD@HOST/, or set EVENTBUS_URL in the environment or in .env"
        )
    return found


def database_url(url: str | None, settings: Settings) -> str:
    """*url*, or what the environment says.

    Raises:
        SetupError: nobody says.
    """
    found = url or settings.database
    if found is None:
        raise SetupError(
            "no database: give --database postgresql://USER:PASSWORD@HOST/DATABASE, or set EVENTBUS_DATABASE in the "
            "environment or in .env"
        )
    return found


def find(url: str | None, namespace: str | None) -> Place:
    """Where to go, for a command that talks to other processes.

    Raises:
        SetupError: nobody says, or it is a broker inside one of them.
    """
    from eventbus.topology import Names

    settings = read_settings()
    found = broker_url(url, settings)
    if found.startswith("memory:"):
        raise SetupError(
            f"{found} lives inside one process, and this command is another one: "
            "give the --url amqp://... of the broker that your services use"
        )
    return Place(found, Names(namespace or settings.namespace), settings)


@asynccontextmanager
async def connected(
    place: Place, topology: Topology | None = None, declare: Declare | None = None
) -> AsyncIterator[Transport]:
    """A transport to *place*, once *topology* (what every process of the namespace relies on) is there.

    Raises:
        SetupError, TransportError: why not.
    """
    from eventbus.topology import shared
    from eventbus.transport import from_url

    transport = from_url(
        place.url, max_message_bytes=place.settings.max_message_bytes, has_lane=place.settings.has_lane
    )
    try:
        await transport.open(topology or shared(place.names), declare or place.settings.declare)
        yield transport
    finally:
        await transport.close()


def management(place: Place, url: str | None) -> Management:
    """The management interface of *place*: *url*, what the environment says, or where it usually is.

    Raises:
        SetupError: that is no URL of one.
    """
    from eventbus.transport.rabbitmq.management import Management

    return Management(place.url, url or place.settings.management_url)


def complete(talk: Coroutine[Any, Any, T]) -> T:
    """What *talk* returns: run to its end in a loop of its own, which is loaded here, for `--help` needs none."""
    import asyncio

    return asyncio.run(talk)
