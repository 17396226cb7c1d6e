"""What is shown at the end: one order's way, the figures, what did not hold, and what to try next."""

from dataclasses import asdict

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from services.demo.figures import Check, Figures
from services.demo.ledger import Ledger
from services.demo.scenario import ORDERS, name_of
from services.demo.stage import Doors
from services.demo.trace import Tracing
from services.demo.view import View

TRACED = ORDERS[1]
NAMES = {"duplicates": "duplicates suppressed", "dead_lettered": "dead-lettered"}
NEXT = """
Try next:
  make demo URL=amqp://guest:guest@localhost/   the same figures on RabbitMQ
  make demo SABOTAGE=lose                       a delivery gets lost: it shows
  make demo SABOTAGE=twice                      things are done twice: it shows
  make demo KEEP=1                              stays open: order something
  make shop                                     every service its own process
  README.md                                     hello.py: your own, in 15 lines
"""


def show_report(view: View, tracing: Tracing, figures: Figures, checks: list[Check], ledger: Ledger) -> None:
    view.show()
    view.show(f"The way of {name_of(TRACED.order_id)}, by its trace:")
    view.show(tracing.tree(f"order-placed-{TRACED.order_id}"))
    view.show(table_of(figures))
    for handling in sorted(ledger.missing):
        event = f"{handling.fact.event} of {name_of(handling.fact.about)}"
        view.show(Text(f"{event} is lost: {handling.handler} never handled it, nor gave it up", "red"))
    for handling, count in sorted(ledger.done_again.items()):
        event = f"{handling.fact.event} of {name_of(handling.fact.about)}"
        view.show(Text(f"{event} was handled {count + 1} times by {handling.handler}", "red"))
    failed = [check for check in checks if not check.holds]
    for check in failed:
        view.show(Text(f"FAILED  {check}", "bold red"))
    held = f"{len(checks) - len(failed)} of {len(checks)} expectations held"
    view.show(Text(held, "bold red" if failed else "bold green"))
    view.show(NEXT)


def table_of(figures: Figures) -> Table:
    table = Table(box=SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, figure in asdict(figures).items():
        table.add_row(NAMES.get(name, name), str(figure))
    return table


def show_doors(view: View, doors: Doors) -> None:
    view.show(
        f"The shop stays open until Ctrl-C:\n"
        f"  users    {doors.users}/docs\n"
        f"  orders   {doors.orders}/docs\n"
        f"  mailbox  {doors.mailbox}/mails\n"
        f"  SMTP     {doors.smtp}\n"
    )
