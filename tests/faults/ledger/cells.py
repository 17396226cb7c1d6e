"""The list of what is broken, as data: one cell for each fault, run on each broker line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from tests.faults.ledger import cluster, faults
from tests.faults.ledger.events import Kind
from tests.faults.ledger.stage import Stage

# A crashed worker's claims end after 5 s instead of 30 s: for cells that are about crashes one after the other.
SOON = ("--lease-s", "5")
# Tried with every change, so few: all tests together end within twenty minutes on two cores.
SHORT = ("worker-killed", "broker-killed")


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault, and the flow of events that it falls into."""

    name: str
    says: str
    fault: Callable[[Stage], Awaitable[None]]
    events: int = 1000
    rate: float = 100.0  # a second
    begins_at: float = 0.25  # the share of events that are confirmed when the fault begins
    workers: int = 2
    services: tuple[str, ...] = ("payments", "shipping")
    kind: Kind = "works"  # of every *every*-th event
    every: int = 50
    heartbeat_s: int | None = None
    worker_options: tuple[str, ...] = ()
    dead_letters: int = 0  # how many events may be given up
    needs_cluster: bool = False


def _cells() -> tuple[Cell, ...]:
    beats = faults.HEARTBEAT_S
    return (
        Cell("nothing", "nothing breaks", faults.nothing, events=2000, rate=300),
        # processes
        Cell("worker-killed", "one of two workers: SIGKILL", faults.worker_killed, worker_options=SOON),
        Cell("worker-killed-every-2-s", "one of two workers in turn: SIGKILL every 2 s, as long as events flow",
             faults.worker_killed_every_2_s, events=3000),
        Cell("publisher-killed", "the publisher: SIGKILL four times", faults.publisher_killed),
        Cell("prefetched-300-killed-30-times", "the only worker: SIGKILL thirty times in the middle of 300 events",
             faults.killed_thirty_times, events=300, rate=300, begins_at=0, workers=1, services=("payments",),
             worker_options=("--prefetch", "300", "--work-s", "0.3", *SOON)),
        # the broker
        Cell("broker-killed", "the broker: SIGKILL, and started again", faults.broker_killed),
        Cell("broker-restarted", "the broker: stopped in order, and started again", faults.broker_restarted),
        Cell("connections-closed", "all connections closed by the broker, three times", faults.connections_closed),
        Cell("memory-alarm", "memory alarm for 3 s", faults.memory_alarm),
        Cell("disk-alarm", "disk alarm for 3 s", faults.disk_alarm),
        Cell("consumer-timeout", "handlers that take 8 s where the broker wants an ack within 3 s",
             faults.consumer_timeout, rate=50, kind="slow", worker_options=("--patient",)),
        # the network
        Cell("stalled-short", "the network stalls for 3 s, less than a heartbeat", faults.stalled_short,
             heartbeat_s=beats),
        Cell("stalled-long", "the network stalls for 16 s, four heartbeats", faults.stalled_long, heartbeat_s=beats),
        Cell("stalled-from-the-broker", "what the broker sends does not arrive for 16 s, four heartbeats",
             faults.stalled_from_the_broker, heartbeat_s=beats),
        Cell("stalled-to-the-broker", "what is sent to the broker does not arrive for 16 s, four heartbeats",
             faults.stalled_to_the_broker, heartbeat_s=beats),
        Cell("half-open", "connections that only our side believes in; 4 s heartbeat", faults.half_open,
             heartbeat_s=beats),
        Cell("connections-cut", "connections reset on both sides, three times", faults.cut),
        # queues, policies, arguments
        Cell("queue-deleted", "a service's queue deleted while its workers are away", faults.queue_deleted),
        Cell("retry-queue-in-conflict", "a queue declared by somebody else with other arguments",
             faults.retry_queue_in_conflict),
        Cell("queue-full", "a policy bounds a service's queue while its workers are away", faults.queue_full),
        Cell("retry-copy-refused", "the delay tree refuses retries for 6 s", faults.retry_copy_refused,
             kind="fails", every=4),
        Cell("retry-copy-returned", "the delay tree's bindings are gone for 12 s", faults.retry_copy_returned,
             kind="fails", every=2),
        Cell("retry-exchange-deleted", "exchanges of the delay tree are deleted", faults.retry_exchange_deleted,
             kind="fails", every=4),
        # the store
        Cell("store-cut-off", "the idempotency store does not answer for 6 s", faults.store_cut_off),
        # handlers
        Cell("handler-fails", "one handler in ten fails at first", faults.special_events, kind="fails", every=10),
        Cell("handler-hangs", "handlers hang until their timeout", faults.special_events, kind="hangs"),
        Cell("handler-raises-base-exception", "handlers raise a BaseException", faults.special_events,
             kind="raises-base-exception"),
        Cell("handler-exits", "handlers exit the interpreter", faults.special_events, kind="exits", every=200),
        Cell("handler-blocks", "a handler blocks the event loop for 20 s, five heartbeats", faults.special_events,
             kind="blocks", every=1000, heartbeat_s=beats),
        Cell("handler-publishes-and-exits", "handlers publish, and exit the interpreter", faults.special_events,
             services=("payments",), kind="publishes-and-exits", every=200),
        Cell("poison", "one event kills its worker each time, among 500", faults.special_events, events=500,
             kind="poison", every=500, dead_letters=1, worker_options=SOON),
        *_cluster_cells(),
    )  # fmt: skip


def _cluster_cells() -> tuple[Cell, ...]:
    faults_by_name = {
        "leader-killed": (cluster.leader_killed, "the node that leads the queues: SIGKILL; clients are on another one"),
        "leader-killed-connected-to-it": (
            cluster.leader_killed_connected_to_it,
            "the node that leads the queues: SIGKILL; its clients are led to another one, as by a load balancer",
        ),
        "follower-killed": (cluster.follower_killed, "a node that leads no queue: SIGKILL; clients are on the leader"),
        "node-partitioned": (
            cluster.leader_cut_off,
            f"the leader cut off from the two others for {cluster.CUT_OFF_S:.0f} s; clients are with the two",
        ),
        "node-partitioned-with-its-clients": (
            cluster.leader_cut_off_with_clients,
            f"the leader and all clients cut off from the two others for {cluster.CUT_OFF_S:.0f} s",
        ),
    }
    return tuple(
        Cell(name, says, fault, events=2000, begins_at=0.1, needs_cluster=True)
        for name, (fault, says) in faults_by_name.items()
    )


CELLS: Mapping[str, Cell] = {cell.name: cell for cell in _cells()}
