"""The demo: the whole shop in one process, a scenario with faults, and a judgement at the end.

    scenario.py   who comes, what they do, and what must follow
    stage.py      the shop in one process, in a namespace of its own
    ledger.py     what happened, as told by everybody but the bus
    figures.py    the figures, and whether they are what they must be
    view.py       the story, and the live table
    trace.py      one order's way as a tree

The same figures on `memory://` and on every RabbitMQ; exit code 0 only if every expectation held.
"""

import asyncio
import json
import signal
import sys
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from eventbus import EventBusError
from eventbus.errors import hide_password
from services.demo.figures import Check, Figures, take
from services.demo.ledger import Ledger
from services.demo.scenario import LABELS, ORDERS, REFUSED_MAILS, name_of, play
from services.demo.stage import Shop, open_shop
from services.demo.trace import Tracing
from services.demo.view import Story, View
from services.http import until_stopped
from services.notifications.handlers import service as notifications

INTERRUPTED = 130
TRACED = ORDERS[1]


def main(*, url: str | None, keep: bool, sabotage: str | None, as_json: bool) -> int:
    """Run the demo on the broker at *url*, or on an embedded one; returns the exit code.

    *keep*: leave the shop up until Ctrl-C. *sabotage*: `lose` or `twice`, to see that it is noticed. *as_json*: nothing
    on stdout but the figures, in its last line.
    """
    stream = sys.stderr if as_json else sys.stdout
    view = View(Console(file=stream, force_terminal=stream.isatty(), highlight=False))
    try:
        return asyncio.run(run(view, url or "memory://", keep=keep, sabotage=sabotage, as_json=as_json))
    except asyncio.CancelledError:
        view.say("interrupted")
        return INTERRUPTED
    except EventBusError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # a program's own output
        return 1


async def run(view: View, url: str, *, keep: bool, sabotage: str | None, as_json: bool) -> int:
    this = asyncio.current_task()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)
    tracing = Tracing(view.count_published)
    tracing.install()
    story = Story(view, lambda event_id: LABELS.get(tracing.origin(event_id), event_id))
    story.attach()
    view.say(f"the shop opens on {hide_password(url)}", "bold", mark=">")
    late = (notifications,) if sabotage == "lose" else ()
    async with open_shop(url, refuse=REFUSED_MAILS, late=late) as shop:
        with view:
            await play(shop, sabotage=sabotage, say=lambda line: view.say(line, "bold", mark=">"))
        figures, checks, ledger = await take(shop, failed_attempts=story.failed_attempts, seconds=view.elapsed_s)
        report(view, tracing, figures, checks, ledger)
        if as_json:
            print(json.dumps(asdict(figures)), flush=True)  # noqa: T201  # a program's own output
        if keep:
            show_doors(view, shop)
            await until_stopped()
    return 0 if all(check.holds for check in checks) else 1


def report(view: View, tracing: Tracing, figures: Figures, checks: list[Check], ledger: Ledger) -> None:
    """The order's way, the figures, what did not hold, what to try next."""
    view.show()
    view.show(f"the way of {name_of(TRACED.order_id)}, by its trace:")
    view.show(tracing.tree(f"order-placed-{TRACED.order_id}"))
    table = Table(box=SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, figure in asdict(figures).items():
        table.add_row(FIGURE_NAMES.get(name, name), str(figure))
    view.show(table)
    for handling in sorted(ledger.missing):
        about = name_of(handling.fact.about)
        view.show(f"lost: {handling.fact.event} of {about} was never handled by {handling.handler}")
    for handling, count in sorted(ledger.done_again.items()):
        about = name_of(handling.fact.about)
        view.show(f"done twice: {handling.handler} handled {handling.fact.event} of {about} {count + 1} times")
    failed = [check for check in checks if not check.holds]
    for check in failed:
        view.show(f"FAILED  {check}")
    view.show(f"{len(checks) - len(failed)} of {len(checks)} expectations held")
    view.show(NEXT)


FIGURE_NAMES = {"duplicates": "duplicates suppressed", "dead_lettered": "dead-lettered"}
NEXT = """
Try next:
  make demo URL=amqp://guest:guest@localhost/    the same on RabbitMQ: the same figures
  make demo SABOTAGE=lose                        the broker loses a delivery: does it show?
  make demo SABOTAGE=twice                       the idempotency store forgets: does that show?
  make demo KEEP=1                               the shop stays open: order something yourself
  make shop                                      every service a process of its own
  README.md                                      your own first service in 15 lines: hello.py
"""


def show_doors(view: View, shop: Shop) -> None:
    doors = shop.doors
    view.show(
        f"The shop stays open until Ctrl-C:\n"
        f"  users    {doors.users}/docs\n"
        f"  orders   {doors.orders}/docs\n"
        f"  mailbox  {doors.mailbox}/mails  (SMTP on port {doors.smtp_port})\n"
    )
