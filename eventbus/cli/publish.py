"""`eventbus publish`: one event by hand, checked like any other."""

from __future__ import annotations

import json
import re
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from eventbus.cli import output
from eventbus.cli.connection import Namespace, Place, Url, complete, find
from eventbus.cli.output import WrongUsage

if TYPE_CHECKING:
    from eventbus.envelope import Envelope
    from eventbus.event import Catalogue

SOURCE = "/programs/eventbus"
_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def publish(
    type: Annotated[str, typer.Argument(metavar="TYPE", help="order_placed (its newest version) or order_placed.v1")],
    data: Annotated[str, typer.Argument(metavar="JSON|-", help="The event's data; - reads them from stdin.")],
    schemas: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE[:CATALOGUE]",
            help="Check the data against the event's class. Without it they are published as they are, "
            "and TYPE must have its version.",
        ),
    ] = None,
    url: Url = None,
    namespace: Namespace = None,
    id: Annotated[str | None, typer.Option(help="The event's id: the same one again is a duplicate (random)")] = None,
    subject: Annotated[str | None, typer.Option(help="What it is about, an order's number for example.")] = None,
    source: Annotated[str | None, typer.Option(help=f"Where it comes from (EVENTBUS_SOURCE, {SOURCE})")] = None,
    delay: Annotated[str | None, typer.Option(metavar="TIME", help="Hold it back: 500ms, 10s, 5m, 2h or 1d.")] = None,
    require_subscriber: Annotated[
        bool, typer.Option("--require-subscriber", help="Fail if nobody subscribes to it (a tail counts).")
    ] = False,
    as_json: output.Json = False,
) -> None:
    """Publish an event, and print its id once the broker has confirmed it."""
    later = _duration(delay) if delay is not None else None
    if later is not None and require_subscriber:
        raise WrongUsage("--delay and --require-subscriber exclude each other: who will be there then is not known yet")
    place = find(url, namespace)
    envelope = _envelope(type, _read(data), schemas, source or place.settings.source or SOURCE, id, subject)
    complete(_publish(place, envelope, later, require_subscriber=require_subscriber))
    if as_json:
        output.say_json(output.cloud_event(envelope, with_data=True))
    else:
        output.say(envelope.id)


async def _publish(place: Place, envelope: Envelope, delay: timedelta | None, *, require_subscriber: bool) -> None:
    from eventbus.bus import Bus

    async with Bus(place.url, namespace=place.names.namespace) as bus:
        await bus.publish(envelope, delay=delay, require_subscriber=require_subscriber)


def _read(data: str) -> bytes:
    return sys.stdin.buffer.read() if data == "-" else data.encode(errors="surrogateescape")


def _envelope(
    type_: str, data: bytes, schemas: str | None, source: str, id: str | None, subject: str | None
) -> Envelope:
    from datetime import UTC, datetime
    from uuid import uuid4

    from eventbus.envelope import Envelope
    from eventbus.errors import EnvelopeError

    if schemas is None:
        checked = _unchecked(type_, data)
    else:
        from eventbus.cli import load

        type_, checked = _checked(type_, data, load.catalogue(schemas))
    try:
        return Envelope(
            id=id if id is not None else str(uuid4()),
            source=source,
            type=type_,
            time=datetime.now(UTC),
            subject=subject,
            data=checked,
        )
    except EnvelopeError as error:
        raise WrongUsage(str(error)) from error


def _unchecked(type_: str, data: bytes) -> bytes:
    """*data*, which nobody but their reader can check, if they are JSON."""
    from eventbus.event import is_name, split_type

    name, version = split_type(type_)
    if version is None or not is_name(name):
        raise WrongUsage(
            f"{type_!r} is no event's type: give name and version, like order_placed.v1, "
            "or --schemas MODULE, which knows the newest version"
        )
    try:
        json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise WrongUsage("the data are not UTF-8") from None
    except json.JSONDecodeError as error:
        raise WrongUsage(f"the data are no JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise WrongUsage(f"the data are no JSON: {error}") from None
    return data


def _refuse_constant(constant: str) -> object:
    raise ValueError(f"{constant} is no number in JSON")


def _checked(type_: str, data: bytes, catalogue: Catalogue) -> tuple[str, bytes]:
    """The full type, and *data* as its class writes them."""
    from eventbus.errors import EnvelopeError
    from eventbus.event import from_json, split_type, to_json

    name, version = split_type(type_)
    versions = catalogue.versions(name)
    if not versions:
        guess = catalogue.suggest(name)
        hint = f"did you mean {guess!r}?" if guess else f"there are {', '.join(catalogue.names)}"
        raise WrongUsage(f"no event {name!r} in the catalogue: {hint}")
    full = f"{name}.v{versions[-1] if version is None else version}"
    model = catalogue.find(full)
    if model is None:
        raise WrongUsage(
            f"no event {name!r} v{version} in the catalogue (known: {', '.join(f'v{v}' for v in versions)})"
        )
    try:
        return full, to_json(from_json(model, data))
    except EnvelopeError as error:
        raise WrongUsage(str(error)) from error


def _duration(text: str) -> timedelta:
    from eventbus.delay import LONGEST

    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if match is None:
        raise WrongUsage(f"--delay {text!r} is no time: give a number with its unit: 500ms, 10s, 5m, 2h or 1d")
    seconds = float(match[1]) * _UNITS_S[match[2]]
    if seconds > LONGEST.total_seconds():
        raise WrongUsage(f"--delay {text} is too long: {LONGEST.days} days at most")
    return timedelta(seconds=seconds)
