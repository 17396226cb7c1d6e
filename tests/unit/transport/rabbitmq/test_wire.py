"""A header frame that the client cannot read becomes one of the same length that it can."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from eventbus.transport.rabbitmq.wire import UNREADABLE_DELIVERY_MODE, readable

HEADERS = 0x2000


def frame(flags: int, properties: bytes) -> bytes:
    return struct.pack(">HHQH", 60, 0, 77, flags) + properties


def table(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def read(header: bytes) -> ContentHeader:
    content = ContentHeader()
    content.unmarshal(header)
    return content


UNREADABLE = [
    frame(HEADERS, table(b"\x01aT" + (2**60).to_bytes(8, "big"))),  # a timestamp of the year 36,536,598
    frame(HEADERS, table(b"\x02\xff\xfeV")),  # a name that is no UTF-8
    frame(HEADERS, table(b"\x01a?")),  # a type that nobody knows
]


@pytest.mark.parametrize("header", UNREADABLE)
def test_an_unreadable_header_is_marked_and_keeps_its_length_and_its_bodys_size(header: bytes) -> None:
    with pytest.raises(ValueError):
        read(header)

    mended = readable(header)

    assert len(mended) == len(header)
    assert read(mended).body_size == 77
    assert read(mended).properties.delivery_mode == UNREADABLE_DELIVERY_MODE


def test_a_readable_header_is_left_alone() -> None:
    header = ContentHeader(body_size=3, properties=Basic.Properties(headers={"a": 1}, delivery_mode=2)).marshal()

    assert readable(header) is header


@given(st.integers(0, 0xFFFF), st.binary(max_size=80))
def test_whatever_a_header_holds_it_can_be_read_afterwards(flags: int, properties: bytes) -> None:
    mended = readable(frame(flags, properties))

    assert len(mended) == 14 + len(properties)
    assert read(mended).body_size == 77
