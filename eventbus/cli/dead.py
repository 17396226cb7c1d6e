"""`eventbus dead`: look at a service's dead letters where they are, and publish them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from eventbus.cli import letters as shown
from eventbus.cli import output
from eventbus.cli.connection import Namespace, Place, Url, complete, find
from eventbus.cli.output import WrongUsage
from eventbus.errors import EventBusError

if TYPE_CHECKING:
    from eventbus.dead_letters import DeadLetter, DeadLetters

app = typer.Typer(help="Dead letters: list, look, publish again.")

ServiceName = Annotated[str, typer.Argument(metavar="SERVICE", help="Whose dead letters.", show_default=False)]


class NoSuchLetter(EventBusError):
    """What was asked for is not among the dead letters (any more)."""


@app.callback(invoke_without_command=True)
def dead(context: typer.Context) -> None:
    output.show_help_alone(context)


@app.command("list", epilog="Example: eventbus dead list payments")
def list_(service: ServiceName, url: Url = None, namespace: Namespace = None, as_json: output.Json = False) -> None:
    """List a service's dead letters, the oldest first. They stay where they are."""
    place = find(url, namespace)
    letters = complete(_all(place, service))
    if as_json:
        output.say_json([_summary(letter) for letter in letters])
    elif letters:
        _print_table(letters)
    else:
        output.say(f"{service} has no dead letters")


@app.command("show", epilog="Example: eventbus dead show payments 1f0c5a9be2d4")
def show(
    service: ServiceName,
    id: Annotated[str, typer.Argument(metavar="ID", help="As `dead list` prints it.", show_default=False)],
    url: Url = None,
    namespace: Namespace = None,
    as_json: output.Json = False,
) -> None:
    """Show all of one dead letter: why, how often, the handler's traceback, headers and data."""
    place = find(url, namespace)
    letter = next((letter for letter in complete(_all(place, service)) if letter.id == id), None)
    if letter is None:
        raise NoSuchLetter(f"{service} has no dead letter {id}: see eventbus dead list {service}")
    if as_json:
        output.say_json(_details(letter))
    else:
        _print_details(letter)


@app.command("replay", epilog="Example: eventbus dead replay payments --reason exhausted --handler capture")
def replay(
    service: ServiceName,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Which, as `dead list` prints them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    reason: Annotated[str | None, typer.Option(metavar="REASON", help="Those given up for this reason.")] = None,
    handler: Annotated[str | None, typer.Option(metavar="NAME", help="Those given up by this handler.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    namespace: Namespace = None,
    as_json: output.Json = False,
) -> None:
    """Publish dead letters again, to the handler that gave them up, which starts over at attempt 1.

    Each is confirmed, then removed. What was handled meanwhile is recognised as a duplicate.
    """
    wanted = _choice(ids or [], everything, reason, handler)
    shown.must_be_able_to_ask("dead letters", yes=yes, are_named=bool(ids))
    place = find(url, namespace)
    chosen = {letter.id for letter in complete(_all(place, service)) if wanted(letter)}
    if missing := sorted(set(ids or []) - chosen):
        raise NoSuchLetter(
            f"{service} has no such dead letter: {', '.join(missing)}; nothing was replayed, "
            f"see eventbus dead list {service}"
        )
    count = 0
    if chosen and shown.is_agreed(_question(service, len(chosen)), yes=yes):
        count = complete(_replay(place, service, chosen))
    if as_json:
        output.say_json({"replayed": count})
    else:
        output.say(f"{count} of {service} replayed")


def _question(service: str, count: int) -> str:
    what = "1 dead letter" if count == 1 else f"{count} dead letters"
    return f"Publish {what} of {service} again?"


def _choice(ids: list[str], everything: bool, reason: str | None, handler: str | None) -> Callable[[DeadLetter], bool]:
    """Which letters are meant. Several conditions must all hold."""
    from eventbus.delivery import Reason

    if reason is not None and reason not in get_args(Reason):
        raise WrongUsage(f"--reason {reason!r} is none: use {', '.join(get_args(Reason))}")
    if everything and ids:
        raise WrongUsage("--all and IDs exclude each other")
    if not (everything or ids or reason or handler):
        raise WrongUsage("which dead letters? Name IDs, --reason, --handler or --all")
    return lambda letter: (
        (not ids or letter.id in ids)
        and (reason is None or letter.reason == reason)
        and (handler is None or letter.handler == handler)
    )


async def _all(place: Place, service: str) -> list[DeadLetter]:
    async with _desk(place, service) as desk:
        return [letter async for letter in desk]


async def _replay(place: Place, service: str, ids: set[str]) -> int:
    # What died since the list was made was not agreed to.
    async with _desk(place, service) as desk:
        return await desk.replay(lambda letter: letter.id in ids)


def _desk(place: Place, service: str) -> DeadLetters:
    from eventbus.dead_letters import DeadLetters

    return DeadLetters(service, url=place.url, namespace=place.names.namespace)


# ── how they are shown ──────────────────────────────────────────────────────────────────────────────


def _summary(letter: DeadLetter) -> dict[str, object]:
    """A dead letter without its data."""
    return {
        "id": letter.id,
        **shown.event_of(letter.envelope),
        "handler": letter.handler,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "first_failed": letter.first_failed.isoformat(),
    }


def _details(letter: DeadLetter) -> dict[str, object]:
    return _summary(letter) | {"trace": letter.trace} | shown.as_json(_headers(letter), letter.body)


def _headers(letter: DeadLetter) -> Iterator[tuple[str, object]]:
    """Without the trace, which is shown by itself."""
    return ((name, value) for name, value in sorted(letter.headers.items()) if value != letter.trace or not value)


def _print_table(letters: list[DeadLetter]) -> None:
    shown.print_table(
        ("id", "first failed", "type", "handler", "reason", "attempts", "error"),
        (
            (
                letter.id,
                letter.first_failed.strftime("%Y-%m-%dT%H:%M:%SZ"),
                letter.envelope.type if letter.envelope else "-",
                letter.handler or "-",
                letter.reason,
                str(letter.attempts),
                letter.error,
            )
            for letter in letters
        ),
    )


def _print_details(letter: DeadLetter) -> None:
    summary = _summary(letter)
    names = ("id", "type", "event_id", "source", "subject", "handler", "reason", "error", "attempts", "first_failed")
    shown.print_facts({name: summary[name] for name in names})
    if letter.trace:
        output.say("\ntraceback")
        for line in letter.trace.splitlines():
            output.say(f"  {output.printable(line)}")
    shown.print_content(_headers(letter), letter.body)
