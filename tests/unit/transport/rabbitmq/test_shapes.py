"""Tables that are read by what the ones before had in common: always what is read of each alone."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventbus.transport.rabbitmq import shapes
from eventbus.transport.rabbitmq.frames import Malformed, Table, read_table, write_plain
from eventbus.transport.rabbitmq.shapes import TableReader


def entry(name: str, value: bytes) -> bytes:
    return bytes((len(name),)) + name.encode() + value


def text(value: bytes) -> bytes:
    return b"S" + len(value).to_bytes(4, "big") + value


PADDING = entry("p", text(b"x" * 50))  # so that a table is long enough to be remembered
TEXTS = st.sampled_from([b"", b"1", b"2", b"\xff", b"12", b"\xc3\xa4", b"\xc3", b"\xa4"]).map(text)
OTHERS = st.sampled_from([
    b"t\x01", b"t\x00", b"t\x02", b"b\x02", b"b\x03", b"u\x00\x03", b"V", b"d" + bytes(8),
    b"A" + text(b"V")[1:], b"F" + text(entry("a", b"V"))[1:],
])  # fmt: skip
ENTRIES = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "ab"]), TEXTS | OTHERS), max_size=4)


@given(st.lists(st.tuples(st.booleans(), ENTRIES, st.none() | st.integers(0, 99)), max_size=40))
@example([(True, [("a", text(value))], None) for value in (b"1", b"2", b"\xff", b"3")])
@example([(True, [("a", text(b"1")), ("a", text(last))], None) for last in (b"2", b"2", b"2", b"3")])
@example([(True, [("a", b"b\x02")], None)] * 4)
@example([(True, [("a", b"F" + text(entry("a", b"V"))[1:])], None)] * 4)
@example([(True, [("a", text(one)), ("b", text(b"12"[len(one) :]))], None) for one in (b"1", b"2", b"", b"12") * 5])
def test_tables_are_read_as_if_alone_whatever_came_before(
    tables: list[tuple[bool, list[tuple[str, bytes]], int | None]],
) -> None:
    """Other names, texts, lengths and types; names that come twice; damaged ones."""
    reader = TableReader()
    for is_long, entries, damaged in tables:
        table = b"".join(entry(name, value) for name, value in entries)
        if is_long:
            table = PADDING + table
        if damaged is not None and table:
            place = damaged % len(table)
            table = table[:place] + b"\xff" + table[place + 1 :]
        try:
            alone = read_table(table, 0, len(table))
        except Malformed:
            with pytest.raises(Malformed):
                reader.read(b"before" + table + b"behind", 6, 6 + len(table))
        else:
            read = reader.read(b"before" + table + b"behind", 6, 6 + len(table))
            assert repr(read) == repr(alone)  # types and order, too
            for value in (*read.values.values(), read.values, read.foreign):  # all of it is the caller's
                if isinstance(value, dict | list):
                    value.clear()


def headers(source: str, type_: str, id_: str) -> bytes:
    """The entries of an event's headers."""
    attributes = {"specversion": "1.0", "source": source, "type": type_, "id": id_}
    table = write_plain({f"cloudEvents_{name}": value for name, value in attributes.items()}, {})
    assert table is not None
    return table[4:]


class Spied:
    """A reader of tables, and how many of them it has to read as if alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alone = 0
        self._reader, self._read_table = TableReader(), read_table
        monkeypatch.setattr(shapes, "read_table", self._spy)

    def _spy(self, data: bytes, begin: int, end: int) -> Table:
        self.alone += 1
        return self._read_table(data, begin, end)

    def read(self, entries: bytes) -> bool:
        """Whether it was known."""
        alone = self.alone
        read = self._reader.read(entries, 0, len(entries))
        assert read == self._read_table(entries, 0, len(entries))
        return self.alone == alone


def test_what_is_the_same_in_tables_is_compared_and_no_more_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Spied(monkeypatch)

    assert [reader.read(headers("/shop", "placed", str(number))) for number in range(4)] == [False, False, True, True]
    assert not reader.read(headers("/shop", "placed", "10"))  # of another size
    # Another text where it was the same: then that is read, too.
    assert [reader.read(headers("/shop", "closed", str(number))) for number in range(3)] == [False, False, True]
    assert reader.read(headers("/shop", "placed", "9"))


def test_senders_of_many_lengths_and_a_thousand_types_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Spied(monkeypatch)
    for number in range(10_000):
        reader.read(headers("/services/" + "s" * (number % 7), f"placed_{number % 1009}.v1", f"{number:08}"))

    assert reader.alone < 300


def test_what_comes_by_once_is_forgotten_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Spied(monkeypatch)
    for size in range(1000):
        for _ in range(2):
            reader.read(headers("/shop", "placed", "x" * size))
    assert not any(reader.read(headers("/services/shop", "placed", f"{number:08}")) for number in range(3))

    for number in range(20_000):
        reader.read(headers("/services/shop", "placed", f"{number:08}"))
        reader.read(headers("/shop", "placed", "x" * (number % 4000)))

    assert reader.read(headers("/services/shop", "placed", "90000000"))


@pytest.mark.parametrize("size", [0, 49, 5000])
def test_tables_that_are_too_short_or_too_long_to_gain_are_not_remembered(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Spied(monkeypatch)

    assert not any(reader.read(entry("a", text(b"x" * (size - 7))) if size else b"") for _ in range(4))


def test_numbers_and_bools_are_the_same_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Spied(monkeypatch)

    def with_number(number: int, id_: str) -> bytes:
        return headers("/shop", "placed", id_) + entry("n", b"b" + bytes((number,))) + entry("t", b"t\x01")

    assert [reader.read(with_number(7, str(number))) for number in range(3)] == [False, False, True]
    assert not reader.read(with_number(8, "3"))


def test_a_table_that_ends_within_what_the_one_before_held_is_read_to_its_own_end() -> None:
    reader = TableReader()
    one = headers("/services/shop", "placed", "1")
    both = one + entry("b", text(b"2"))
    for _ in range(3):
        assert reader.read(both, 0, len(both)).values["b"] == "2"

    assert reader.read(both, 0, len(one)) == read_table(one, 0, len(one))
    with pytest.raises(Malformed):
        reader.read(both, 0, len(both) - 1)
