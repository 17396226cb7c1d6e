"""The event that every program publishes and handles, and what makes it so many bytes of JSON."""

from __future__ import annotations

from pydantic import BaseModel

DEFAULT_BYTES = 420
_LINE_BYTES = 46
_ROOM_BYTES = 70  # the other fields; the note fills the rest


class Line(BaseModel):
    sku: str
    quantity: int
    cents: int


class Order(BaseModel):
    """What other clients send. `sent_ns` is on the clock that all processes of a machine share."""

    number: int
    sent_ns: int
    lines: list[Line]
    note: str


def lines_of(size: int) -> list[Line]:
    """The lines of an order of *size* bytes: about half of it."""
    count = max(0, (size - _ROOM_BYTES) // 2 // _LINE_BYTES)
    return [Line(sku=f"sku-{number:04}", quantity=2, cents=1999) for number in range(count)]


def note_of(size: int) -> str:
    """What makes an order *size* bytes."""
    without = Order(number=100_000, sent_ns=10**12, lines=lines_of(size), note="")
    return "n" * max(0, size - len(without.model_dump_json()))
