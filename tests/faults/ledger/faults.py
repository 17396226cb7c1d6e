"""What breaks, one function each. It is called when events flow, says when its fault is over, and returns."""

from __future__ import annotations

import asyncio
from typing import Any

from eventbus.topology import Topology
from eventbus.transport.rabbitmq import RabbitMQ
from tests.faults.ledger.books import CUT_OFF
from tests.faults.ledger.proxy import DIRECTIONS
from tests.faults.ledger.stage import Stage
from tests.servers import ServerError

SHORT_S = 3.0
HEARTBEAT_S = 4  # what cells ask for that wait for it
LONG_S = 16.0  # more than three of those heartbeats: client and broker have given up
KILLS = 30
WIDE = 20  # runs under way by which a worker has gone wide
LEVELS_USED = 8  # of the delay tree, by delays up to a minute


async def nothing(stage: Stage) -> None:
    stage.over()


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def worker_killed(stage: Stage) -> None:
    stage.workers[0].kill()
    stage.over()


async def worker_killed_every_2_s(stage: Stage) -> None:
    turn = 0
    while stage.confirmed() < 0.95 * stage.events:
        stage.workers[turn % len(stage.workers)].kill()
        turn += 1
        await asyncio.sleep(2)
    stage.over()


async def killed_thirty_times(stage: Stage) -> None:
    """All events wait; the only worker is killed as soon as it is in the middle of many."""
    worker = stage.workers[0]
    await worker.stop()
    await stage.published(1)
    worker.start()
    for _ in range(KILLS):
        life, runs = worker.lives, stage.runs()
        await _until_or(lambda runs=runs: stage.runs() >= runs + WIDE, 2)
        worker.kill()
        await stage.until(lambda life=life: worker.lives > life, "it is started anew")  # type: ignore[misc]
    stage.over()


async def publisher_killed(stage: Stage) -> None:
    for share in (0.25, 0.4, 0.55, 0.7):
        await stage.published(share)
        stage.publisher.kill()
    stage.over()


async def special_events(stage: Stage) -> None:
    """The events themselves are the fault; it is over when the last of them has had its bad run."""
    await stage.published(1)
    stage.over()


# ── the broker ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def broker_killed(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.kill)
    await asyncio.to_thread(stage.broker.start)
    stage.over()


async def broker_restarted(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.restart)
    stage.over()


async def connections_closed(stage: Stage) -> None:
    for share in (0.25, 0.4, 0.55):
        await stage.published(share)
        await stage.ctl("close_all_connections", "closed for a test")
    stage.over()


async def memory_alarm(stage: Stage) -> None:
    await stage.ctl("set_vm_memory_high_watermark", "0.00001")
    await asyncio.sleep(SHORT_S)
    await stage.ctl("set_vm_memory_high_watermark", "0.6")
    stage.over()


async def disk_alarm(stage: Stage) -> None:
    await stage.ctl("set_disk_free_limit", "900GB")
    await asyncio.sleep(SHORT_S)
    await stage.ctl("set_disk_free_limit", "50MB")
    stage.over()


async def consumer_timeout(stage: Stage) -> None:
    """Acks are due within 3 s, and some handlers take 8."""
    setting = "[application:set_env(rabbit, Name, Value) || {{Name, Value}} <- [{}]]."
    await stage.ctl("eval", setting.format("{consumer_timeout, 3000}, {channel_tick_interval, 500}"))
    try:
        await stage.ctl("close_all_connections", "so that the new limit holds")
        await stage.published(0.75)
    finally:
        await stage.ctl("eval", setting.format("{consumer_timeout, 1800000}, {channel_tick_interval, 60000}"))
    await stage.ctl("close_all_connections", "so that the old limit holds again")
    stage.over()


# ── the network ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def stalled_short(stage: Stage) -> None:
    stage.proxy.stall(*DIRECTIONS)
    await asyncio.sleep(SHORT_S)
    stage.proxy.flow()
    stage.over()


async def stalled_long(stage: Stage) -> None:
    stage.proxy.stall(*DIRECTIONS)
    await asyncio.sleep(LONG_S)
    stage.proxy.flow()
    stage.over()


async def stalled_from_the_broker(stage: Stage) -> None:
    stage.proxy.stall("from the broker")
    await asyncio.sleep(LONG_S)
    stage.proxy.flow()
    stage.over()


async def stalled_to_the_broker(stage: Stage) -> None:
    stage.proxy.stall("to the broker")
    await asyncio.sleep(LONG_S)
    stage.proxy.flow()
    stage.over()


async def half_open(stage: Stage) -> None:
    stage.proxy.leave_half_open()
    stage.over()


async def cut(stage: Stage) -> None:
    for share in (0.25, 0.4, 0.55):
        await stage.published(share)
        stage.proxy.cut()
    stage.over()


# ── queues, policies, arguments ───────────────────────────────────────────────────────────────────────────────────────


async def queue_deleted(stage: Stage) -> None:
    """Of one service, while nobody consumes it: what is in it is known, and so is what comes while it is absent."""
    queue = f"events.{stage.services[0]}"
    for worker in stage.workers:
        await worker.stop()
    await stage.published(0.5)
    before: list[int] = []

    async def delete() -> None:
        stage.destroyed |= await _ids_in(stage, queue)
        await stage.api("DELETE", f"/queues/VHOST/{queue}")
        before.append(stage.confirmed())

    async def declare_again() -> None:
        absent = "select event from published where confirmed not null order by confirmed limit -1 offset ?"
        stage.destroyed |= {row[0] for row in stage.books.execute(absent, before)}
        for worker in stage.workers:
            worker.start()
        await stage.until(stage.is_declared, "the queue is there again, and bound")

    await stage.paused(delete)
    await stage.published(0.75)
    await stage.paused(declare_again)
    stage.over()


async def retry_queue_in_conflict(stage: Stage) -> None:
    """Somebody declares the retry queue with other arguments: workers end, and go on once that is put right."""
    path = f"/queues/VHOST/events.{stage.services[0]}.retry"
    await stage.api("DELETE", path)
    wrong: dict[str, object] = {"durable": True, "arguments": {"x-queue-type": "quorum", "x-delivery-limit": 5}}
    async with asyncio.timeout(30):
        while not await _declared(stage, path, wrong):  # the worker declares it too, and may be the first
            await stage.api("DELETE", path)
    lives = sum(worker.lives for worker in stage.workers)
    await stage.until(lambda: sum(worker.lives for worker in stage.workers) > lives, "a worker gives up")
    await stage.api("DELETE", path)
    stage.over()


async def queue_full(stage: Stage) -> None:
    """A policy bounds one service's queue, and its workers are away: publishes are refused until it is lifted."""
    policy: dict[str, object] = {
        "pattern": f"^events\\.{stage.services[0]}$", "definition": {"max-length": 20}, "apply-to": "queues"
    }  # fmt: skip
    for worker in stage.workers:
        await worker.stop()
    await stage.api("PUT", "/policies/VHOST/small", policy)
    await asyncio.sleep(2 * SHORT_S)
    await stage.api("DELETE", "/policies/VHOST/small")
    for worker in stage.workers:
        worker.start()
    stage.over()


async def retry_copy_refused(stage: Stage) -> None:
    policy: dict[str, object] = {
        "pattern": "^events\\.delay", "definition": {"max-length": 1}, "apply-to": "queues"
    }  # fmt: skip
    await stage.api("PUT", "/policies/VHOST/full", policy)
    await asyncio.sleep(2 * SHORT_S)
    await stage.api("DELETE", "/policies/VHOST/full")
    stage.over()


async def retry_copy_returned(stage: Stage) -> None:
    """The delay tree loses its bindings."""
    await _empty_tree(stage)
    taken = [b for b in await stage.api("GET", "/bindings/VHOST") if _is_used_level(b["source"])]
    for binding in taken:
        await stage.api("DELETE", f"{_binding(binding)}/{binding['properties_key']}")
    await stage.resume()
    await asyncio.sleep(4 * SHORT_S)
    for binding in taken:
        await stage.api("POST", _binding(binding), {"routing_key": binding["routing_key"], "arguments": {}})
    stage.over()


async def retry_exchange_deleted(stage: Stage) -> None:
    await _empty_tree(stage)
    for level in range(LEVELS_USED):
        await stage.api("DELETE", f"/exchanges/VHOST/events.delay.v1.{level:02d}")
    await stage.resume()
    stage.over()


async def store_cut_off(stage: Stage) -> None:
    stage.books.execute("insert into switches values (?)", (CUT_OFF,))
    await asyncio.sleep(2 * SHORT_S)
    stage.books.execute("delete from switches")
    stage.over()


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _until_or(condition: Any, longest_s: float) -> None:
    """Until *condition* holds, or for *longest_s*."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + longest_s
    while not condition() and loop.time() < deadline:  # noqa: ASYNC110  # other processes bring it about
        await asyncio.sleep(0.02)


async def _empty_tree(stage: Stage) -> None:
    """Pause the publisher until no retry is on its way.

    What a broker cannot move from one level of the tree to the next it tries again after three minutes, and 32 such
    messages stop the level: that is the broker's, and these cells are about the copies that we publish.
    """
    await stage.pause()
    await stage.until(lambda: stage.handled() == stage.confirmed() * len(stage.services), "nothing is in the tree")


async def _ids_in(stage: Stage, queue: str) -> set[str]:
    """The events that wait in *queue*; all stay there."""
    transport = RabbitMQ(stage.url)
    await transport.open(Topology(()), "never")
    try:
        async with transport.browse(queue) as deliveries:
            return {str(delivery.message.headers["cloudEvents_id"]) async for delivery in deliveries}
    finally:
        await transport.close()


async def _declared(stage: Stage, path: str, queue: dict[str, object]) -> bool:
    try:
        await stage.api("PUT", path, queue)
    except ServerError:  # in conflict with the right one
        return False
    return True


def _is_used_level(exchange: str) -> bool:
    level = exchange.removeprefix("events.delay.v1.")
    return level.isdigit() and int(level) < LEVELS_USED


def _binding(binding: dict[str, str]) -> str:
    kind = "q" if binding["destination_type"] == "queue" else "e"
    return f"/bindings/VHOST/e/{binding['source']}/{kind}/{binding['destination']}"
