"""`eventbus tail`: events as they are published, through a private queue that ends with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from eventbus.cli import output
from eventbus.cli.connection import Namespace, Place, Url, complete, connected, find
from eventbus.cli.output import WrongUsage

if TYPE_CHECKING:
    from eventbus.envelope import Envelope
    from eventbus.transport.base import Delivery

_TIME, _TYPE = 24, 24  # widths that line most events up


def tail(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="order_placed, order_placed.v1, payments.* or # for all.")
    ] = "#",
    url: Url = None,
    namespace: Namespace = None,
    data: Annotated[bool, typer.Option("--data", help="Show the events' data too.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="End after so many events.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each as a CloudEvent in JSON, one a line.")] = False,
) -> None:
    """Show events as they are published, from now on, until Ctrl-C.

    Each with its time, type, id, source and subject. Nobody else misses an event because of it.
    What is published with a delay goes to its subscribers by another way, and is not shown.
    """
    from eventbus.errors import SetupError
    from eventbus.service import pattern_of

    place = find(url, namespace)
    try:
        key = pattern_of(pattern)
    except SetupError as error:
        raise WrongUsage(str(error)) from error
    view = _View(with_data=data, as_json=as_json)
    complete(_tail(place, key, view, limit))


async def _tail(place: Place, key: str, view: _View, limit: int | None) -> None:
    async with connected(place) as transport, transport.tail(place.names.events, key) as deliveries:
        output.note(f"events of {key} at {transport.broker.host}:{transport.broker.port}, until Ctrl-C")
        shown = 0
        async for delivery in deliveries:
            view.show(delivery)
            shown += 1
            if shown == limit:
                return


class _View:
    """How an event is shown."""

    def __init__(self, *, with_data: bool, as_json: bool) -> None:
        self._with_data = with_data
        self._as_json = as_json
        self._console = output.console()

    def show(self, delivery: Delivery) -> None:
        from datetime import UTC, datetime

        from eventbus.envelope import decode
        from eventbus.errors import EnvelopeError

        try:
            envelope = decode(delivery.message, now=lambda: datetime.now(UTC))
        except EnvelopeError as error:
            output.note(f"something under {output.printable(delivery.key)} is no event: {error}")
            return
        if self._as_json:
            typer.echo(json.dumps(output.cloud_event(envelope, with_data=self._with_data), ensure_ascii=False))
        else:
            self._show_line(envelope)

    def _show_line(self, envelope: Envelope) -> None:
        from rich.text import Text

        time = envelope.time.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        line = Text.assemble(
            (f"{time:<{_TIME}}", "dim"),
            "  ",
            (f"{output.printable(envelope.type):<{_TYPE}}", "bold cyan"),
            f"  {output.printable(envelope.id)}",
            (f"  {output.printable(envelope.source)}", "dim"),
            f"  {output.printable(envelope.subject)}" if envelope.subject else "",
            f"  {_compact(envelope)}" if self._with_data else "",
        )
        self._console.print(line, soft_wrap=True)


def _compact(envelope: Envelope) -> str:
    found = output.json_data(envelope.data, "data")
    value = next(iter(found.values()))
    return output.printable(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    )
