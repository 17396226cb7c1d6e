"""What the report says of the brokers' own bugs: cluster cells run on one line only, and the others have some."""

from __future__ import annotations

from collections.abc import Iterable

from eventbus.transport.rabbitmq.bugs import OLDEST_WITH_FIXES, Bug, Version, bugs_of, version_of

INTRODUCTION = """\

## Clusters, and the brokers' own bugs

Cluster cells run on three nodes of 4.3; every queue of the services has three members online when the fault begins. The
fault is over when the nodes that are left could go on: at the kill, or the cut. What they need to notice it (up to 10 s
of a cut, by the tick time that is set here) and to elect is recovery. Only where the clients are all with the minority
it is over when that is healed. 4.3 decides on its metadata by majority too: there is no partition handling to choose.

What each version here is known to do to messages in a cluster, by the numbers of RabbitMQ's own issues and pull
requests (`eventbus topology verify` tells it of a live broker):
"""


def known_bugs(versions: Iterable[str]) -> list[str]:
    """The section on *versions*, in lines: what is known of each."""
    rows = [row for text in sorted(set(versions), key=version_of) for row in _rows(text)]
    return [INTRODUCTION, "| version | bug | loses messages | fixed in | what |", "|---|---|---|---|---|", *rows]


def _rows(text: str) -> list[str]:
    version = version_of(text)
    rows = [_row(text, bug) for bug in bugs_of(version)]
    if version < OLDEST_WITH_FIXES:
        rows.append(f"| {text} | all found since | assume so | never | this line gets no fixes any more |")
    return rows or [f"| {text} | none known | | | |"]


def _row(text: str, bug: Bug) -> str:
    loses = "yes" if bug.loses else "no: it stands still"
    return f"| {text} | {bug.source} | {loses} | {_told(bug.fixed)} | {bug.what} |"


def _told(version: Version) -> str:
    return ".".join(map(str, version))
