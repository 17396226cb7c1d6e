"""The demo: the whole shop in one process, a scenario with faults, and a judgement at the end.

    scenario.py   who comes, what they do, and what must follow
    stage.py      the shop in one process, in a namespace of its own
    ledger.py     what happened, as told by everybody but the bus
    figures.py    the figures, and whether they are what they must be
    view.py       the story, and the live table
    trace.py      one order's way as a tree
    report.py     what is shown at the end

The same figures on `memory://` and on every RabbitMQ; exit code 0 only if every expectation held.
"""

import asyncio
import json
import signal
import sys
from dataclasses import asdict

import httpx
from rich.console import Console

from eventbus import EventBusError
from eventbus.errors import hide_password
from services.demo.figures import take
from services.demo.report import show_doors, show_report
from services.demo.scenario import LABELS, REFUSED_MAILS, play
from services.demo.stage import open_shop
from services.demo.trace import Tracing
from services.demo.view import Story, View
from services.http import until_stopped
from services.notifications.handlers import service as notifications

INTERRUPTED = 130


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
        view.say("interrupted", "bold", mark=">")
        return INTERRUPTED
    except (EventBusError, httpx.HTTPError, OSError) as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 1


async def run(view: View, url: str, *, keep: bool, sabotage: str | None, as_json: bool) -> int:
    """Open the shop, let it happen, judge; a signal cancels this, and the shop closes in order."""
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
        show_report(view, tracing, figures, checks, ledger)
        if as_json:
            print(json.dumps(asdict(figures)), flush=True)
        if keep:
            show_doors(view, shop.doors)
            await until_stopped()
    return 0 if all(check.holds for check in checks) else 1
