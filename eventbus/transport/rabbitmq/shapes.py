"""Header tables, read by what the ones before had in common.

Of tables that are equally long most have the same names, and texts of the same lengths, some of them the same text: an
event's type, its sender. What was the same before is compared at once; only the rest is read. Nothing here decides what
a table means: `frames.read_table` does, and whatever fits no shape is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Final

from eventbus.transport.rabbitmq.frames import TEXT, Table, read_table, read_value

# The byte that tells tables of one size apart. In ours it is the length of the sender's name, and then the type's is
# known as well; in others it is any byte, and what they have in common is found more rarely.
_TELLING: Final = 55
_MOST_SHAPES: Final = 256
_LONGEST_SHAPE: Final = 4096  # bytes of a table
_FORGET_AFTER: Final = 10_000  # tables that no shape fits
_PLAIN_TYPES: Final = frozenset({str, int, bool})  # nobody can change their values


class TableReader:
    """Reads the tables of one channel, as `frames.read_table`."""

    __slots__ = ("_misses", "_shapes", "_since_forgotten")

    def __init__(self) -> None:
        self._shapes: dict[int, _Shape] = {}  # by the table's size and its telling byte
        self._misses: dict[int, int] = {}  # as above: tables that had to be read as if alone
        self._since_forgotten = 0  # all of those

    def read(self, data: bytes, at: int, end: int) -> Table:
        """As `read_table`."""
        size = end - at
        sort = size << 8 | data[at + _TELLING] if size > _TELLING else size
        shape = self._shapes.get(sort)
        if shape is not None:
            pieces = shape.cut(data, at)
            if pieces[::2] == shape.same:
                values = shape.values.copy()
                place = 1
                try:
                    for name in shape.names:
                        values[name] = str(pieces[place], "utf-8")
                        place += 2
                except UnicodeDecodeError:
                    pass  # bytes, then, and foreign
                else:
                    return Table(values, shape.foreign.copy())
        table = read_table(data, at, end)
        if _TELLING < size <= _LONGEST_SHAPE:
            self._learn(sort, data[at:end], table)
        return table

    def _learn(self, sort: int, entries: bytes, table: Table) -> None:
        """Read the next of this *sort* by a shape, less what is another text in this one."""
        self._since_forgotten += 1
        if self._since_forgotten == _FORGET_AFTER:
            # Senders come and go. And if few tables have anything in common, to learn must cost little beside to read.
            self._since_forgotten = 0
            self._shapes.clear()
            self._misses.clear()
        before = self._shapes.get(sort)
        if before is None and len(self._shapes) >= _MOST_SHAPES:
            return
        misses = self._misses[sort] = self._misses.get(sort, 0) + 1
        if misses & (misses - 1) == 0 and (shape := _shape_of(entries, table, before)) is not None:
            self._shapes[sort] = shape


@dataclass(frozen=True, slots=True)
class _Shape:
    """Tables whose names and lengths, and some of whose values, are always the same."""

    entries: Mapping[str, tuple[bytes, bytes]]  # of the last that was learnt from: what comes before a text, and it
    changing: frozenset[str]  # the names of the texts that are not the same
    cut: Callable[[bytes, int], tuple[bytes, ...]]  # into what is the same, a text, what is the same, a text, ...
    same: tuple[bytes, ...]
    names: tuple[str, ...]  # of the texts in between
    values: dict[str, object]  # in their order; what changes is written over
    foreign: dict[str, bytes]


def _shape_of(table: bytes, read: Table, before: _Shape | None) -> _Shape | None:
    """The shape of *table*: the same is what is the same in it and in all that were learnt from until *before*.

    None if it holds something else than texts, numbers and bools, or a name twice.
    """
    if not all(type(value) in _PLAIN_TYPES for value in read.values.values()):
        return None
    entries: dict[str, tuple[bytes, bytes]] = {}
    at = 0
    for name in read.values:
        begin, at = at, at + 1 + table[at]
        text_at = at + 5 if table[at] == TEXT else len(table)
        _, at = read_value(table, at, len(table), 0)
        entries[name] = table[begin : min(text_at, at)], table[text_at:at]
    if at != len(table):
        return None
    changing = frozenset[str]()
    if before is not None:  # also where the names or lengths are others: what has changed once will change again
        changed = {name for name, entry in entries.items() if entry != before.entries.get(name)}
        changing = before.changing | changed
    same, names = [b""], list[str]()
    for name, (start, text) in entries.items():
        same[-1] += start
        if name in changing and type(read.values[name]) is str:
            names.append(name)
            same.append(b"")
        else:
            same[-1] += text
    sizes = [len(same[0])]
    for name, piece in zip(names, same[1:], strict=True):
        sizes += [len(entries[name][1]), len(piece)]
    cut = Struct("".join(f"{size}s" for size in sizes)).unpack_from
    return _Shape(entries, changing, cut, tuple(same), tuple(names), dict(read.values), dict(read.foreign))
