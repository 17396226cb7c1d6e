"""What breaks in a cluster, one function each: a node dies, or is cut off from the two others.

Clients reach one node at a time through the cell's proxy, as through a load balancer. Queues are led by the node that
they were declared on, the first one, and the clients are led to another one where a cell wants that. A fault is over
when the nodes that are left could go on without the one that is not: what they need to notice and to elect belongs to
the recovery. Only clients that are cut off with a minority cannot go on before that is healed.
"""

from __future__ import annotations

import asyncio

from eventbus.transport.base import CONNECT_TIMEOUT_S
from eventbus.transport.rabbitmq.session import MAX_BACKOFF_S
from tests.cluster import NET_TICKTIME_S, NODES, ClusterServer, Members
from tests.faults.ledger.stage import Stage

# A node that is silent for so long is taken for gone by the others: the most that Erlang's tick time says.
NOTICED_S = 1.25 * NET_TICKTIME_S
# Longer than that, and than a publish waits for its confirm.
CUT_OFF_S = 35.0
# A try to consume that begins in a minority hangs, after the healing too, until its deadline; and the next one waits.
HANGING_S = CONNECT_TIMEOUT_S + MAX_BACKOFF_S
FLOWING = 20  # events handled by every service: they flow again


async def leader_killed(stage: Stage) -> None:
    """The clients are connected to another node than the one that dies."""
    leader = await _leader(stage)
    await _lead_clients_to(stage, _another(leader))
    await _kill_and_bring_back(stage, leader)


async def leader_killed_connected_to_it(stage: Stage) -> None:
    """The clients are connected to the node that dies, and are led to another one at once."""
    leader = await _leader(stage)
    stage.proxy.host, stage.proxy.port = _cluster(stage).cluster.address_of(_another(leader))
    await _kill_and_bring_back(stage, leader)


async def follower_killed(stage: Stage) -> None:
    """The clients are connected to the leader."""
    leader = await _leader(stage)
    await _kill_and_bring_back(stage, _another(leader))


async def leader_cut_off(stage: Stage) -> None:
    """The clients are with the two others."""
    leader = await _leader(stage)
    await _lead_clients_to(stage, _another(leader))
    await asyncio.to_thread(_cluster(stage).cluster.cut_off, leader)
    stage.over()
    await asyncio.sleep(CUT_OFF_S)
    await _assert_the_others_have_noticed(stage, leader)
    await _flows(stage)
    await asyncio.to_thread(_cluster(stage).cluster.heal, leader)
    await _whole(stage)


async def leader_cut_off_with_clients(stage: Stage) -> None:
    """The clients are with the one that is cut off."""
    leader = await _leader(stage)
    await asyncio.to_thread(_cluster(stage).cluster.cut_off, leader)
    await stage.stands_still(stage.confirmed, CUT_OFF_S)
    await _assert_the_others_have_noticed(stage, leader)
    await asyncio.to_thread(_cluster(stage).cluster.heal, leader)
    stage.over()
    await _whole(stage)


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cluster(stage: Stage) -> ClusterServer:
    assert isinstance(stage.broker, ClusterServer)
    return stage.broker


def _another(node: str) -> str:
    return NODES[(NODES.index(node) + 1) % len(NODES)]


async def _leader(stage: Stage) -> str:
    """The node that leads every queue of the services; each has all of its members online."""
    names = [f"events.{service}{suffix}" for service in stage.services for suffix in ("", ".retry")]
    members = await _members(stage)
    queues = {name: members[name] for name in names}
    assert all(queue.online == set(NODES) for queue in queues.values()), queues
    leaders = {queue.leader for queue in queues.values()}
    assert len(leaders) == 1, queues
    return leaders.pop()


async def _members(stage: Stage) -> dict[str, Members]:
    return await asyncio.to_thread(_cluster(stage).members, stage.url)


async def _lead_clients_to(stage: Stage, node: str) -> None:
    stage.proxy.host, stage.proxy.port = _cluster(stage).cluster.address_of(node)
    stage.proxy.cut()
    await _flows(stage)


async def _kill_and_bring_back(stage: Stage, node: str) -> None:
    """The others go on without *node*; it comes back when events have flowed on."""
    await asyncio.to_thread(_cluster(stage).cluster.kill_node, node)
    stage.over()
    await _flows(stage)
    await _assert_the_others_have_noticed(stage, node)
    await asyncio.to_thread(_cluster(stage).cluster.start_node, node)
    await _whole(stage)


async def _assert_the_others_have_noticed(stage: Stage, node: str) -> None:
    members = await _members(stage)
    assert all(queue.online == set(NODES) - {node} and queue.leader != node for queue in members.values()), members


async def _flows(stage: Stage) -> None:
    """Until what is confirmed by now is handled, and some more: nothing is left of what broke before."""
    wanted = min(stage.confirmed() + FLOWING, stage.events) * len(stage.services)
    await stage.until(lambda: stage.handled() >= wanted, "events flow again")


async def _whole(stage: Stage) -> None:
    """Until every queue has all of its members again: the next cell begins with that."""
    await asyncio.to_thread(_cluster(stage).wait_for_nodes)
    async with asyncio.timeout(60):
        while any(queue.online != set(NODES) for queue in (await _members(stage)).values()):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
