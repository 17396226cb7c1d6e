"""The list of what is broken, as data: one cell for each fault, run on each broker line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tests.faults.ledger import cluster, faults
from tests.faults.ledger.events import Kind
from tests.faults.ledger.stage import Stage
from tests.faults.ledger.worker import BLOCKED_S, TIMEOUT

# A crashed worker's claims end after 5 s instead of 30 s: for cells that are about crashes one after the other.
SOON = ("--lease-s", "5")
# Tried with every change, so few: all tests together end within twenty minutes on two cores.
SHORT = ("worker-killed", "broker-killed")


# Which event shows that all work again: one that was published after the fault's end, since what was under way then
# proves nothing; or the first that came to a handler then, where it was the handling that broke: many may wait.
Recovery = Literal["new", "waiting"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault, and the flow of events that it falls into."""

    name: str
    says: str
    fault: Callable[[Stage], Awaitable[None]]
    events: int = 10_000
    least_events: int = 100  # with fewer the fault would come when the flow is over
    rate: float = 350.0  # a second: what two cores carry with two services, and some more
    flow_s: float = 8.0  # events flow for so long at least, more slowly if they are few
    begins_at: float = 0.25  # the share of events that are confirmed when the fault begins
    flows: bool = True  # or the fault publishes by itself
    workers: int = 2
    services: tuple[str, ...] = ("payments", "shipping")
    kind: Kind = "works"  # of every *every*-th event
    every: int = 50
    share: float = 0.7  # none of *kind* behind this share of the events
    heartbeat_s: int | None = None
    worker_options: tuple[str, ...] = ()
    dead_letters: int = 0  # how many events may be given up
    within_s: float = 300.0  # for all of it, on a busy computer; some 70 s on two idle cores
    recovers_within_s: float = 10.0  # from the fault's end to the first handled event
    recovers_with: Recovery = "new"
    needs_cluster: bool = False


def _cells() -> tuple[Cell, ...]:
    beats = faults.HEARTBEAT_S
    # A dead connection is known to be dead a heartbeat later.
    beating = partial(Cell, heartbeat_s=beats, recovers_within_s=beats + 10)
    blocking = partial(faults.special_events, lasting_s=BLOCKED_S)
    hanging = partial(faults.special_events, lasting_s=TIMEOUT.total_seconds())
    return (
        Cell("nothing", "nothing breaks", faults.nothing),
        # processes
        Cell("worker-killed", "one of two workers: SIGKILL", faults.worker_killed, worker_options=SOON,
             recovers_with="waiting"),
        Cell("worker-killed-every-2-s", "one of two workers in turn: SIGKILL every 2 s for a minute, 5 s leases",
             faults.worker_killed_every_2_s, events=20_000, rate=20_000 / 60, flow_s=60, begins_at=0,
             worker_options=SOON, recovers_with="waiting"),
        Cell("publisher-killed", "the publisher: SIGKILL four times", faults.publisher_killed),
        Cell("prefetched-300-killed-30-times",
             "the only worker: SIGKILL thirty times in the middle of 300 events, 15 s leases",
             faults.killed_thirty_times, events=300, begins_at=0, workers=1, services=("payments",),
             worker_options=("--prefetch", "300", "--concurrency", "20", "--work-s", "0.2", "--lease-s", "15"),
             recovers_with="waiting"),
        # the broker
        Cell("broker-killed", "the broker: SIGKILL, and started again", faults.broker_killed),
        Cell("broker-killed-fifty-times", "the broker: fifty times SIGKILL within 5 ms after a publish returned; "
             "this one takes longer, EVENTS=N kills N times", faults.broker_killed_again_and_again, events=50,
             least_events=1, flows=False, begins_at=0, within_s=1500),
        Cell("broker-restarted", "the broker: stopped in order, and started again", faults.broker_restarted),
        Cell("connections-closed", "all connections closed by the broker, three times", faults.connections_closed),
        Cell("memory-alarm", "memory alarm, until nothing was confirmed for 3 s", faults.memory_alarm),
        Cell("disk-alarm", "disk alarm, until nothing was confirmed for 3 s", faults.disk_alarm),
        Cell("consumer-timeout", "handlers that take 8 s where the broker wants an ack within 3 s",
             faults.consumer_timeout, flow_s=30, begins_at=0.1, kind="slow", every=250, worker_options=("--patient",)),
        # the network
        beating("stalled-short", "the network stalls for 3 s, less than a heartbeat", faults.stalled_short),
        beating("stalled-long", "the network stalls for 20 s, five heartbeats", faults.stalled_long),
        beating("stalled-from-the-broker", "what the broker sends does not arrive for 20 s, five heartbeats",
                faults.stalled_from_the_broker),
        beating("stalled-to-the-broker", "what is sent to the broker does not arrive for 20 s, five heartbeats",
                faults.stalled_to_the_broker),
        beating("half-open", "connections that only our side believes in; 4 s heartbeat", faults.half_open),
        Cell("connections-cut", "connections reset on both sides, three times", faults.cut),
        # queues, policies, arguments
        Cell("queue-deleted", "a service's queue deleted while its workers are away", faults.queue_deleted,
             recovers_with="waiting"),
        Cell("queue-deleted-while-consumed", "a service's queue deleted under its workers",
             faults.queue_deleted_while_consumed, worker_options=("--prefetch", "10")),
        Cell("retry-queue-in-conflict", "a queue declared by somebody else with other arguments",
             faults.retry_queue_in_conflict, recovers_with="waiting"),
        Cell("queue-full", "a policy bounds a service's queue while its workers are away", faults.queue_full,
             recovers_with="waiting"),
        Cell("retry-copy-refused", "the delay tree refuses retries for 6 s", faults.retry_copy_refused,
             kind="fails", every=4, recovers_with="waiting"),
        Cell("retry-copy-returned", "the delay tree's bindings are gone for 12 s", faults.retry_copy_returned,
             kind="fails", every=2, recovers_with="waiting"),
        Cell("retry-exchange-deleted", "exchanges of the delay tree are deleted", faults.retry_exchange_deleted,
             kind="fails", every=4, recovers_with="waiting"),
        # the store
        Cell("store-cut-off", "the idempotency store does not answer until nothing was handled for 6 s",
             faults.store_cut_off, recovers_with="waiting"),
        # handlers
        Cell("handler-fails", "one handler in ten fails at first", faults.special_events, kind="fails", every=10,
             recovers_with="waiting"),
        Cell("handler-hangs", "handlers hang until their timeout", hanging, kind="hangs",
             recovers_with="waiting"),
        Cell("handler-raises-base-exception", "handlers raise a BaseException", faults.special_events,
             kind="raises-base-exception", recovers_with="waiting"),
        Cell("handler-exits", "handlers exit the interpreter, 5 s leases", faults.exiting_handlers, kind="exits",
             every=1000, worker_options=SOON, recovers_with="waiting"),
        beating("handler-blocks", "a handler blocks the event loop for 20 s, five heartbeats", blocking, flow_s=28,
                services=("payments",), kind="blocks", every=2000, share=0.2, recovers_with="waiting"),
        Cell("handler-publishes-and-exits", "handlers publish, and exit the interpreter, 5 s leases; what they "
             "publish is counted too", faults.exiting_handlers, services=("payments",), kind="publishes-and-exits",
             every=1000, worker_options=SOON, recovers_with="waiting"),
        Cell("poison", "one event kills its worker each time, among 500, and is given up; 5 s leases", faults.poison,
             events=600, kind="poison", every=600, dead_letters=1, begins_at=0, services=("payments",),
             worker_options=SOON),
        *_cluster_cells(),
    )  # fmt: skip


def _cluster_cells() -> tuple[Cell, ...]:
    # Slowly: three nodes and the clients share the computer. Long enough for a node to come back while events flow.
    breaking = partial(Cell, events=5000, rate=150.0, flow_s=25.0, begins_at=0.1, kind="fails", every=10,
                       needs_cluster=True, within_s=170.0)  # fmt: skip
    cut_s = cluster.CUT_OFF_S
    return (
        breaking("leader-killed", "the queues' leader: SIGKILL, and started again; clients are on another node",
                 cluster.leader_killed),
        breaking("leader-killed-connected-to-it",
                 "the queues' leader: SIGKILL, and started again; its clients are led to another node",
                 cluster.leader_killed_connected_to_it),
        breaking("follower-killed", "a node that leads no queue: SIGKILL, and started again; clients are on the leader",
                 cluster.follower_killed),
        breaking("node-partitioned",
                 f"the leader cut off from the two others for {cut_s:.0f} s; clients are with the two; recovery counts "
                 f"from the cut, which the two notice after up to {cluster.NOTICED_S:.0f} s",
                 cluster.leader_cut_off, flow_s=cut_s + 20, recovers_within_s=cluster.NOTICED_S + 10),
        breaking("node-partitioned-with-its-clients",
                 f"the leader and all clients cut off from the two others for {cut_s:.0f} s; recovery within "
                 f"{cluster.HANGING_S:.0f} s: a try to consume again hangs in the minority until its deadline",
                 cluster.leader_cut_off_with_clients, recovers_within_s=cluster.HANGING_S),
    )  # fmt: skip


CELLS: Mapping[str, Cell] = {cell.name: cell for cell in _cells()}
