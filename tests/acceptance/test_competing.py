"""A thousand events on a real RabbitMQ: workers of one service share them, services each get all, absent ones later."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from eventbus import Bus, Event, Service, Worker
from tests.rig import until
from tests.servers import BrokerServer

ALL = list(range(1000))


class Placed(Event, name="placed"):
    order_id: int


def counting(name: str) -> tuple[Service, Counter[int]]:
    """A service, and how often its handler has been given each event. Twice the same name is twice the service."""
    handled: Counter[int] = Counter()
    service = Service(name)

    @service.on("placed")
    async def handle(event: Placed) -> None:
        handled[event.order_id] += 1

    return service, handled


@pytest.fixture
def rabbitmq_url(every_line: BrokerServer) -> str:
    """A fresh virtual host on each broker line, one after the other."""
    return every_line.new_vhost()


@pytest.fixture
async def bus(rabbitmq_url: str) -> AsyncIterator[Bus]:
    async with Bus(rabbitmq_url, source="/shop") as bus:
        yield bus


async def publish(bus: Bus, numbers: list[int]) -> None:
    await bus.publish_many([Placed(order_id=number) for number in numbers])


async def test_two_workers_of_one_service_share_its_events(bus: Bus, rabbitmq_url: str) -> None:
    (one, by_one), (other, by_other) = counting("shop"), counting("shop")
    async with Worker(one, url=rabbitmq_url), Worker(other, url=rabbitmq_url):
        await publish(bus, ALL)
        await until(lambda: by_one.total() + by_other.total() >= len(ALL), "all handled")

    assert by_one + by_other == Counter(ALL)  # each once, none by both
    assert by_one
    assert by_other


async def test_two_services_each_handle_all(bus: Bus, rabbitmq_url: str) -> None:
    services = [counting(name) for name in ("payments", "shipping")]
    async with AsyncExitStack() as workers:
        for service, _ in services:
            await workers.enter_async_context(Worker(service, url=rabbitmq_url))
        await publish(bus, ALL)
        await until(lambda: all(handled.total() >= len(ALL) for _, handled in services), "all handled by both")

    assert [handled for _, handled in services] == [Counter(ALL)] * 2


async def test_a_service_that_was_down_gets_what_it_missed(bus: Bus, rabbitmq_url: str) -> None:
    (present, by_present), (absent, by_absent) = counting("payments"), counting("shipping")
    async with Worker(present, url=rabbitmq_url):
        async with Worker(absent, url=rabbitmq_url):
            pass  # its queue exists from now on
        await publish(bus, ALL[:500])
        await until(lambda: by_present.total() == 500, "handled by who is there")
        assert not by_absent
        async with Worker(absent, url=rabbitmq_url):
            await publish(bus, ALL[500:])
            await until(lambda: by_absent.total() >= len(ALL), "handled by who comes late")

    assert by_present == by_absent == Counter(ALL)
