"""`eventbus undeliverable`: look at what no queue took, and publish it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final

import typer

from eventbus.cli import letters as shown
from eventbus.cli import output
from eventbus.cli.connection import Namespace, Place, Url, complete, find
from eventbus.cli.output import WrongUsage
from eventbus.errors import EventBusError

if TYPE_CHECKING:
    from eventbus.undeliverable import Undeliverable, UndeliverableMessage

app = typer.Typer(help="What no queue took: list, look, publish again.")

# What each reason says to a person; `{}` is the service or the type.
REASONS: Final = {
    "no-retry-queue": "a retry of {} was due, and its retry queue was missing or not bound",
    "no-subscriber": "a delayed {} was due, and nobody subscribed to it",
    "no-dead-queue": "{} gave it up, and its queue of dead letters was missing or not bound",
    "taken-from-dead-letters": "a policy took it from the dead letters of {}",
    "unknown": "the bus did not put it there",
}


class NoSuchMessage(EventBusError):
    """What was asked for is not among the undeliverable messages (any more)."""


@app.callback(invoke_without_command=True)
def undeliverable(context: typer.Context) -> None:
    output.show_help_alone(context)


@app.command("list", epilog="Example: eventbus undeliverable list --json")
def list_(url: Url = None, namespace: Namespace = None, as_json: output.Json = False) -> None:
    """List what no queue took, with the reason it could be there. All of it stays where it is."""
    messages = complete(_all(find(url, namespace)))
    if as_json:
        output.say_json([_summary(message) for message in messages])
    elif messages:
        shown.print_table(
            ("id", "type", "why", "goes to", "reason"),
            (
                (m.id, m.envelope.type if m.envelope else "-", m.why, m.target or "-", _reason(m))
                for m in messages
            ),
        )  # fmt: skip
    else:
        output.say("nothing is undeliverable")


@app.command("show", epilog="Example: eventbus undeliverable show 1f0c5a9be2d4")
def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="As `undeliverable list` prints it.", show_default=False)],
    url: Url = None,
    namespace: Namespace = None,
    as_json: output.Json = False,
) -> None:
    """Show all of one message: why it is there, headers and data."""
    found = next((message for message in complete(_all(find(url, namespace))) if message.id == id), None)
    if found is None:
        raise NoSuchMessage(f"there is no undeliverable message {id}: see eventbus undeliverable list")
    headers = sorted(found.headers.items())
    if as_json:
        output.say_json(_summary(found) | shown.as_json(headers, found.body))
        return
    shown.print_facts(_summary(found))
    shown.print_content(headers, found.body)


@app.command("replay", epilog="Example: eventbus undeliverable replay --target mails")
def replay(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Which, as the list prints them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Those that go to this service, or are of this type.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    namespace: Namespace = None,
    as_json: output.Json = False,
) -> int:
    """Publish messages to where they were going: a service's retries or dead letters, an event's subscribers.

    Each is confirmed, then removed. What still has no queue to go to stays; exit code 3 if there is such.
    """
    wanted = _choice(ids or [], everything, target)
    shown.must_be_able_to_ask("messages", yes=yes, are_named=bool(ids))
    place = find(url, namespace)
    chosen = [message for message in complete(_all(place)) if wanted(message)]
    if missing := sorted(set(ids or []) - {message.id for message in chosen}):
        raise NoSuchMessage(
            f"there is no undeliverable message {', '.join(missing)}; nothing was replayed, "
            "see eventbus undeliverable list"
        )
    count = 0
    if chosen:
        if not shown.is_agreed(f"Publish {len(chosen)} undeliverable messages again?", yes=yes):
            return output.DONE
        count = complete(_replay(place, chosen))
    left = len(chosen) - count
    if as_json:
        output.say_json({"replayed": count, "left": left})
    else:
        output.say(f"{count} replayed" + (f", {left} left: there is no queue to take them yet" if left else ""))
    return output.FOUND_PROBLEMS if left else output.DONE


def _choice(ids: list[str], everything: bool, target: str | None) -> Callable[[UndeliverableMessage], bool]:
    if everything and (ids or target):
        raise WrongUsage("--all excludes IDs and --target")
    if not (everything or ids or target):
        raise WrongUsage("which messages? Name IDs, --target or --all")
    return lambda message: (not ids or message.id in ids) and (target is None or message.target == target)


async def _all(place: Place) -> list[UndeliverableMessage]:
    async with _desk(place) as desk:
        return [message async for message in desk]


async def _replay(place: Place, chosen: list[UndeliverableMessage]) -> int:
    agreed = {message.id for message in chosen}  # what came since the list was made was not agreed to
    async with _desk(place) as desk:
        return await desk.replay(lambda message: message.id in agreed)


def _desk(place: Place) -> Undeliverable:
    from eventbus.undeliverable import Undeliverable

    return Undeliverable(url=place.url, namespace=place.names.namespace)


def _reason(message: UndeliverableMessage) -> str:
    return REASONS[message.why].format(message.target)


def _summary(message: UndeliverableMessage) -> dict[str, object]:
    """A message without its data."""
    return {
        "id": message.id,
        **shown.event_of(message.envelope),
        "why": message.why,
        "reason": _reason(message),
        "target": message.target,
        "exchange": message.exchange,
        "key": message.key,
        "since": message.since.isoformat() if message.since else None,
    }
