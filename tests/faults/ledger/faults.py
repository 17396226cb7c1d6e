"""What breaks, one function each. It is called when events flow, says when its fault is over, and returns.

Each asserts that something broke: a cell must not pass because nothing did.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time

from eventbus import Bus, PublishError
from eventbus.topology import Topology
from eventbus.transport.rabbitmq import RabbitMQ
from tests.faults.ledger.books import BUSY_S, CUT_OFF, SOURCE
from tests.faults.ledger.events import Counted, id_of
from tests.faults.ledger.proxy import DIRECTIONS, Direction
from tests.faults.ledger.stage import Stage
from tests.servers import ServerError, ask_version

SHORT_S = 3.0
HEARTBEAT_S = 4  # what cells ask for that wait for it
LONG_S = 20.0  # more than the four of those heartbeats after which the last client has given up
KILLS = 30
IN_THE_MIDDLE = 10  # further runs by which a worker is in the middle of many
EVERY_S = 2.0
MINUTE_S = 60.0
NEARLY_ALL = 0.97
SOON_S = 0.005  # after a publish returned
LEVELS_USED = 8  # of the delay tree, by delays up to a minute
LONG_AGO_S = 2.0  # a first retry is due sooner
LOST = "connection lost"  # what the bus logs when a session has died
IN_FLIGHT_S = 1.0  # what had arrived when the network stalled is through by then


async def nothing(stage: Stage) -> None:
    stage.over()


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def worker_killed(stage: Stage) -> None:
    stage.workers[0].kill()
    stage.over()


async def worker_killed_every_2_s(stage: Stage) -> None:
    """One in turn, for a minute, and on until events have flowed."""
    loop = asyncio.get_running_loop()
    began_s, kills = loop.time(), 0
    while loop.time() - began_s < MINUTE_S or stage.confirmed() < NEARLY_ALL * stage.events:
        worker = stage.workers[kills % len(stage.workers)]
        await stage.until(lambda worker=worker: worker.is_running, "it was started anew")  # type: ignore[misc]
        worker.kill()
        kills += 1
        await asyncio.sleep(began_s + kills * EVERY_S - loop.time())
    stage.over()


async def killed_thirty_times(stage: Stage) -> None:
    """All events wait; the only worker is killed each time that it is in the middle of many."""
    worker = stage.workers[0]
    await worker.stop()
    await stage.published(1)
    worker.start()
    for _ in range(KILLS):
        wanted = stage.runs() + IN_THE_MIDDLE
        await stage.until(lambda wanted=wanted: stage.runs() >= wanted, "it is in the middle of many")  # type: ignore[misc]
        worker.kill()
        lives = worker.lives
        await stage.until(lambda lives=lives: worker.lives > lives, "it is started anew")  # type: ignore[misc]
    stage.over()


async def publisher_killed(stage: Stage) -> None:
    for share in (0.25, 0.4, 0.55, 0.7):
        await stage.published(share)
        stage.publisher.kill()
    stage.over()


# ── handlers: the events themselves are the fault ─────────────────────────────────────────────────────────────────────


async def special_events(stage: Stage, lasting_s: float = 0.0) -> None:
    """Over when the last handler has misbehaved, *lasting_s* after it began to."""
    await stage.until(lambda: _are_behind_us(stage), "each has misbehaved")
    last: float | None = stage.books.execute("select max(at) from broken").fetchone()[0]
    assert last is not None, "no handler has misbehaved"
    await asyncio.sleep(last + lasting_s - time.time())
    stage.over()


def _are_behind_us(stage: Stage) -> bool:
    """Whether every special event has misbehaved; one whose first run a neighbour ended has worked at the second."""
    misbehaved = set(stage.books.execute("select service, number from broken"))
    effect = "select count(*) from effects where service = ? and event = ?"
    return all(
        (service, number) in misbehaved or stage.number(effect, service, id_of(stage.seed, number))
        for service in stage.services
        for number in stage.specials
    )


async def exiting_handlers(stage: Stage) -> None:
    lives = sum(worker.lives for worker in stage.workers)
    await special_events(stage)
    await stage.until(lambda: sum(worker.lives for worker in stage.workers) > lives, "a worker has ended")


async def poison(stage: Stage) -> None:
    """It is given up while many others are handled; the rest comes then."""
    await stage.published(5 / 6)
    await stage.pause()
    async with asyncio.timeout(100):
        while not (await stage.depths()).get(f"events.{stage.services[0]}.dead"):  # noqa: ASYNC110  # it does not tell
            await asyncio.sleep(1)
    assert stage.workers[0].lives + stage.workers[1].lives > 4, "it killed nobody"
    stage.over()
    await stage.resume()


# ── the broker ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def broker_killed(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.kill)
    assert ask_version(stage.broker.url) is None
    await asyncio.to_thread(stage.broker.start)
    stage.over()


async def broker_killed_again_and_again(stage: Stage) -> None:
    """As often as there are events: right after the publish of each returned."""
    chance = random.Random(stage.seed)
    await asyncio.to_thread(stage.broker.restart)  # it forgets a queue that was declared within the last second
    for number in range(stage.events):
        event_id = id_of(stage.seed, number)
        began = (event_id, number, time.time())
        stage.books.execute("insert into published (event, number, began) values (?, ?, ?)", began)
        returned = await _publish_and_kill(stage, Counted(number=number, kind="works"), event_id, chance)
        stage.books.execute("update published set confirmed = ? where event = ?", (returned, event_id))
        await asyncio.to_thread(stage.broker.start)
    stage.over()


async def _publish_and_kill(stage: Stage, event: Counted, event_id: str, chance: random.Random) -> float:
    """Publish *event* and SIGKILL the broker within `SOON_S`; when the publish returned."""
    loop = asyncio.get_running_loop()
    async with Bus(stage.url, source=SOURCE) as bus:
        while True:
            try:
                await bus.publish(event, id=event_id)
            except PublishError:  # nothing is promised: once more
                continue
            returned, returned_s = time.time(), loop.time()
            await asyncio.sleep(chance.uniform(0, SOON_S))
            if loop.time() - returned_s <= SOON_S:  # else this computer was busy elsewhere: the same event once more
                stage.broker.kill()  # its first step is the signal
                return returned


async def broker_restarted(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.stop)
    assert ask_version(stage.broker.url) is None
    await asyncio.to_thread(stage.broker.start)
    stage.over()


async def connections_closed(stage: Stage) -> None:
    everybody = len(stage.proxy.links)
    for share in (0.25, 0.4, 0.55):
        links = await _all_connected(stage, share, everybody)
        await stage.close_connections("closed for a test")
        stage.over()
        await stage.gone(links)


async def memory_alarm(stage: Stage) -> None:
    await stage.ctl("set_vm_memory_high_watermark", "0.00001")
    await stage.stands_still(stage.confirmed, SHORT_S)
    await stage.ctl("set_vm_memory_high_watermark", "0.6")
    stage.over()


async def disk_alarm(stage: Stage) -> None:
    await stage.ctl("set_disk_free_limit", "900GB")
    await stage.stands_still(stage.confirmed, SHORT_S)
    await stage.ctl("set_disk_free_limit", "50MB")
    stage.over()


async def consumer_timeout(stage: Stage) -> None:
    """Acks are due within 3 s, and some handlers take 8."""
    setting = "[application:set_env(rabbit, Name, Value) || {{Name, Value}} <- [{}]]."
    await stage.ctl("eval", setting.format("{consumer_timeout, 3000}, {channel_tick_interval, 500}"))
    try:
        links = stage.proxy.links
        await stage.close_connections("so that the new limit holds")
        await stage.gone(links)
        await _all_connected(stage, 0, len(links))
        lost = stage.said(LOST)
        await stage.published(0.75)
        await stage.until(lambda: stage.said(LOST) > lost, "the broker has waited too long for an ack")
    finally:
        await stage.ctl("eval", setting.format("{consumer_timeout, 1800000}, {channel_tick_interval, 60000}"))
    await stage.close_connections("so that the old limit holds again")
    stage.over()


# ── the network ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def stalled_short(stage: Stage) -> None:
    await _stalled(stage, SHORT_S, *DIRECTIONS)


async def stalled_long(stage: Stage) -> None:
    await _stalled_dead(stage, *DIRECTIONS)


async def stalled_from_the_broker(stage: Stage) -> None:
    await _stalled_dead(stage, "from the broker")


async def stalled_to_the_broker(stage: Stage) -> None:
    await _stalled_dead(stage, "to the broker")


async def _stalled(stage: Stage, seconds: float, *directions: Direction) -> None:
    stage.proxy.stall(*directions)
    await asyncio.sleep(IN_FLIGHT_S)
    confirmed = stage.confirmed()
    await asyncio.sleep(seconds - IN_FLIGHT_S)
    assert confirmed == stage.confirmed() < stage.events, "events were confirmed over a network that stalls"
    stage.proxy.flow()
    stage.over()


async def _stalled_dead(stage: Stage, *directions: Direction) -> None:
    """For so long that the connections die of it."""
    links = stage.proxy.links
    await _stalled(stage, LONG_S, *directions)
    await stage.gone(links)


async def half_open(stage: Stage) -> None:
    links, lost = stage.proxy.links, stage.said(LOST)
    stage.proxy.leave_half_open()
    stage.over()
    await stage.gone(links)
    await stage.until(lambda: stage.said(LOST) > lost, "somebody has noticed")


async def cut(stage: Stage) -> None:
    everybody = len(stage.proxy.links)
    for share in (0.25, 0.4, 0.55):
        links = await _all_connected(stage, share, everybody)
        stage.proxy.cut()
        stage.over()
        await stage.gone(links)


# ── queues, policies, arguments ───────────────────────────────────────────────────────────────────────────────────────


async def queue_deleted(stage: Stage) -> None:
    """Of one service, while nobody consumes it: what is in it is known, and so is what comes while it is absent."""
    queue = f"events.{stage.services[0]}"
    for worker in stage.workers:
        await worker.stop()
    await stage.published(0.4)
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
    await stage.published(0.55)
    await stage.paused(declare_again)
    assert stage.destroyed, "nothing was destroyed"
    stage.over()


async def queue_deleted_while_consumed(stage: Stage) -> None:
    """Under workers that stand still for a moment, so that it is known what is in it: all that has no effect yet."""
    service = stage.services[0]
    await _freeze(stage)
    await stage.published(0.5)
    await stage.pause()
    undone = "select event from published where event not in (select event from effects where service = ?)"
    stage.destroyed |= {row[0] for row in stage.books.execute(undone, (service,))}
    waiting = await _ids_in(stage, f"events.{service}")
    assert waiting, "nothing is destroyed"
    assert waiting <= stage.destroyed, "what is handled waits again"
    lost = stage.said(LOST)
    await stage.api("DELETE", f"/queues/VHOST/events.{service}")
    deleted = time.time()
    for worker in stage.workers:
        worker.thaw()
    stage.over()
    await stage.resume()
    await stage.until(stage.is_declared, "the queue is there again, and bound")
    absent = "select event from published where began between ? and ?"
    stage.destroyed |= {row[0] for row in stage.books.execute(absent, (deleted, time.time()))}
    await stage.until(lambda: stage.said(LOST) > lost, "its workers have noticed")


async def retry_queue_in_conflict(stage: Stage) -> None:
    """Somebody declares the retry queue with other arguments: workers end, and go on once that is put right.

    While the workers are away: 3.10 does not tell consumers of a queue that is deleted and declared again at once.
    """
    path = f"/queues/VHOST/events.{stage.services[0]}.retry"
    wrong: dict[str, object] = {"durable": True, "arguments": {"x-queue-type": "quorum", "x-delivery-limit": 5}}
    for worker in stage.workers:
        await worker.stop()
    await stage.api("DELETE", path)
    assert await _declared(stage, path, wrong)
    for worker in stage.workers:
        worker.start()
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
    await stage.stands_still(stage.confirmed, 2 * SHORT_S)
    await stage.api("DELETE", "/policies/VHOST/small")
    for worker in stage.workers:
        worker.start()
    stage.over()


async def retry_copy_refused(stage: Stage) -> None:
    policy: dict[str, object] = {
        "pattern": "^events\\.delay", "definition": {"max-length": 1}, "apply-to": "queues"
    }  # fmt: skip
    await stage.api("PUT", "/policies/VHOST/full", policy)
    await _retries_wait(stage, 2 * SHORT_S)
    await stage.api("DELETE", "/policies/VHOST/full")
    stage.over()


async def retry_copy_returned(stage: Stage) -> None:
    """The delay tree loses its bindings."""
    await _empty_tree(stage)
    taken = [b for b in await stage.api("GET", "/bindings/VHOST") if _is_used_level(b["source"])]
    for binding in taken:
        await stage.api("DELETE", f"{_binding(binding)}/{binding['properties_key']}")
    await stage.resume()
    await _retries_wait(stage, 4 * SHORT_S)
    for binding in taken:
        await stage.api("POST", _binding(binding), {"routing_key": binding["routing_key"], "arguments": {}})
    stage.over()


async def retry_exchange_deleted(stage: Stage) -> None:
    await _empty_tree(stage)
    lost = stage.said(LOST)
    for level in range(LEVELS_USED):
        await stage.api("DELETE", f"/exchanges/VHOST/events.delay.v1.{level:02d}")
    await stage.resume()
    stage.over()
    await stage.until(lambda: stage.said(LOST) > lost, "somebody has missed the exchange")


async def store_cut_off(stage: Stage) -> None:
    stage.books.execute("insert into switches values (?)", (CUT_OFF,))
    await stage.stands_still(stage.handled, 2 * SHORT_S)
    assert stage.said("consuming pauses"), "nobody has noticed"
    stage.books.execute("delete from switches")
    stage.over()


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _retries_wait(stage: Stage, seconds: float) -> None:
    """Return after *seconds*, in which retries must have been held up. (Workers may come to their own rescue then.)"""
    waiting = """
        select count(*) from broken left join effects using (service, event) where effects.at is null and broken.at < ?
    """
    ends, most = time.time() + seconds, 0
    while time.time() < ends:
        most = max(most, stage.number(waiting, time.time() - LONG_AGO_S))
        await asyncio.sleep(0.25)
    assert most, "no retry was held up"


async def _all_connected(stage: Stage, share: float, everybody: int) -> frozenset[object]:
    """The connections, when this *share* is published and *everybody* is connected again."""
    await stage.published(share)
    # All but a publisher that has published everything meanwhile.
    await stage.until(lambda: len(stage.proxy.links) + stage.publisher.has_ended >= everybody, "all are connected")
    return stage.proxy.links


async def _freeze(stage: Stage) -> None:
    """All workers, none of them in the middle of writing into the books."""
    stage.books.execute("pragma busy_timeout = 100")
    while True:
        for worker in stage.workers:
            worker.freeze()
        try:
            stage.books.execute("begin immediate")
            stage.books.execute("commit")
            break
        except sqlite3.OperationalError:  # locked
            for worker in stage.workers:
                worker.thaw()
            await asyncio.sleep(0.01)
    stage.books.execute(f"pragma busy_timeout = {BUSY_S * 1000:.0f}")


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
