"""The broker's own bugs that the bus cannot work around: which versions have them, and what they do.

Loss and standstill only, as RabbitMQ's release notes tell them. What differs between lines without being a bug is in
`lines`. A version that is not listed may still be old: only what is known stands here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Bug:
    """In the versions from *since* on, up to but not including *fixed*."""

    since: Version
    fixed: Version
    what: str
    source: str
    loses: bool = True
    # Needs members of a queue on several nodes: a single node cannot meet it.
    needs_cluster: bool = True


BUGS: Final = (
    Bug((4, 0, 0), (4, 0, 8), "members of a quorum queue could come to differ in what they hold", "PR 13530"),
    Bug(
        (4, 0, 0),
        (4, 1, 5),
        "after a network partition what a channel publishes may never reach the queue's new leader",
        "issue 14589",
    ),
    Bug((4, 3, 0), (4, 3, 3), "a queue's leader could confirm before a majority had stored", "Ra PR 637"),
    Bug(
        (4, 3, 0),
        (4, 3, 5),
        "a queue could recover from a checkpoint that was written in part",
        "PR 17012",
        needs_cluster=False,
    ),
    Bug(
        (4, 3, 0),
        (4, 3, 1),
        "a queue could fail to start after the node was killed",
        "Ra PR 629",
        loses=False,
        needs_cluster=False,
    ),
    Bug((4, 0, 0), (4, 2, 7), "dead-lettering may ask the wrong member and stand still", "PR 16203", loses=False),
    Bug((4, 3, 0), (4, 3, 1), "dead-lettering may ask the wrong member and stand still", "PR 16203", loses=False),
    Bug(
        (4, 0, 0),
        (4, 3, 3),
        "dead-lettering may stand still for good after members were changed several times",
        "PR 16652",
        loses=False,
    ),
)
# The oldest line that still gets fixes of what loses messages: the ones before it stay as they are.
OLDEST_WITH_FIXES: Final = (4, 0, 0)


def version_of(text: str) -> Version:
    """`4.0.5-rc.1` is (4, 0, 5)."""
    numbers = [int(number) for number in re.findall(r"\d+", text)[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def bugs_of(version: Version) -> list[Bug]:
    """The known bugs that *version* has."""
    return [bug for bug in BUGS if bug.since <= version < bug.fixed]
