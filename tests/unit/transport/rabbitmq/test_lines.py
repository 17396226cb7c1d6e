"""Which line a broker is of, and how each counts."""

from __future__ import annotations

import pytest

from eventbus.errors import SetupError
from eventbus.transport.rabbitmq.lines import MIB, delivery_count, line_of


@pytest.mark.parametrize(
    ("version", "since", "max_mib"),
    [
        ("3.10.0", (3, 10), 128),
        ("3.10.8", (3, 10), 128),
        ("3.13.7", (3, 10), 128),
        ("4.0.5", (4, 0), 16),
        ("4.2.9", (4, 0), 16),
        ("4.3.0-rc.1", (4, 3), 16),
        ("4.3.6", (4, 3), 16),
        ("5.0.0", (4, 3), 16),
    ],
)
def test_a_version_is_of_the_newest_line_that_is_not_newer(version: str, since: tuple[int, int], max_mib: int) -> None:
    line = line_of("RabbitMQ", version)

    assert line.since == since
    assert line.max_message_bytes == max_mib * MIB


@pytest.mark.parametrize("version", ["3.9.29", "3.8.0", "2.0.0"])
def test_what_is_too_old_is_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(SetupError, match=rf"RabbitMQ {version} is too old.*Upgrade it to 3\.10"):
        line_of("RabbitMQ", version)


@pytest.mark.parametrize(("product", "version"), [("LavinMQ", "2.1.0"), ("RabbitMQ", ""), ("something unnamed", "")])
def test_what_is_no_rabbitmq_is_refused(product: str, version: str) -> None:
    with pytest.raises(SetupError, match=f"{product}.*answered: the bus needs RabbitMQ"):
        line_of(product, version)


@pytest.mark.parametrize(
    ("version", "headers", "is_redelivered", "count"),
    [
        ("3.10.8", {}, False, 0),
        ("3.10.8", {"x-delivery-count": 4}, True, 4),
        ("3.10.8", {}, True, 1),
        ("4.0.5", {"x-delivery-count": 2}, True, 2),
        ("4.3.6", {"x-delivery-count": 1, "x-acquired-count": 3}, True, 3),
        ("4.3.6", {"x-acquired-count": 3}, True, 3),
        ("4.3.6", {}, True, 1),
        # On a first delivery the header is a sender's.
        ("3.10.8", {"x-delivery-count": 99}, False, 0),
        ("3.10.8", {"x-delivery-count": "many"}, True, 1),
        ("3.10.8", {"x-delivery-count": True}, True, 1),
        ("3.10.8", {"x-delivery-count": -7}, True, 1),
    ],
)
def test_a_delivery_is_counted(version: str, headers: dict[str, object], is_redelivered: bool, count: int) -> None:
    assert delivery_count(line_of("RabbitMQ", version), headers, is_redelivered=is_redelivered) == count
