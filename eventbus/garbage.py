"""How often Python looks for garbage while events are handled.

Hundreds of events are on their way at once, each some dozens of objects, more with a shared store or a span, and few of
them are garbage that only the collector finds. By default it looks through the youngest for each 700 new ones, and now
and then through everything that was loaded: a tenth to a third of the time of handling an event (`make bench`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

YOUNG_OBJECTS: Final = 50_000  # about what 1,000 events hold; some MB, if all of it were garbage

_inside = 0  # blocks of `rarely` that have not ended
_before = 0


@contextmanager
def rarely() -> Iterator[None]:
    """Within the block Python looks for each 50,000 new objects. The last that ends sets back what was.

    A program that has set a higher threshold, or has switched the collector off, keeps that.
    """
    global _inside, _before
    young, *older = gc.get_threshold()
    if not _inside and 0 < young < YOUNG_OBJECTS:
        _before = young
        gc.set_threshold(YOUNG_OBJECTS, *older)
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            young, *older = gc.get_threshold()
            if _before and young == YOUNG_OBJECTS:  # nobody has set another one meanwhile
                gc.set_threshold(_before, *older)
            _before = 0


def never_in_what_was_loaded() -> None:
    """Keep what there is now out of the collector's way, for good. Only in a process of our own, once it is ready."""
    gc.collect()
    gc.freeze()
