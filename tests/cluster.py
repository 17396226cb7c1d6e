"""A cluster of three RabbitMQ nodes in containers, whose nodes a test may kill and cut off one by one.

Each node has two networks: one that only the nodes are on, over which they are a cluster, and the engine's own one with
the ports that clients use. So a node that is cut off from the others still has its clients, as it has in a partition.
"""

from __future__ import annotations

import http.client
import io
import json
import secrets
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.engines import (
    CTL_S,
    Leash,
    NoBroker,
    ServerError,
    docker_client,
    free_port,
    image_can_be_pulled,
    image_is_here,
)
from tests.servers import START_S, BrokerServer, ask_version, vhost_of

LINE: Final = "4.3-cluster"
IMAGE: Final = "rabbitmq:4.3-management"
NODES: Final = ("one", "two", "three")
# Silence between nodes is noticed within 5/4 of this, where the broker's default takes a minute and a quarter.
NET_TICKTIME_S: Final = 8
CONFIGURATION: Final = "\n".join(
    [
        "cluster_formation.peer_discovery_backend = classic_config",
        *(f"cluster_formation.classic_config.nodes.{n} = rabbit@{name}" for n, name in enumerate(NODES, 1)),
        f"net_ticktime = {NET_TICKTIME_S}",
        "vm_memory_high_watermark.absolute = 512MiB",
        "disk_free_limit.absolute = 50MB\n",
    ]
)
REMOVE = """
import sys, docker
sys.stdin.read()
client, ours = docker.from_env(), {"label": sys.argv[1]}
for container in client.containers.list(all=True, filters=ours):
    container.remove(force=True, v=True)
for network in client.networks.list(filters=ours):
    network.remove()
"""


def why_none() -> str | None:
    """Why there can be no cluster here, or None if there can."""
    if docker_client() is None:
        return "no Docker engine answers"
    if not image_is_here(IMAGE) and not image_can_be_pulled(IMAGE):
        return f"the Docker engine neither holds nor can pull {IMAGE}"
    return None


@dataclass(eq=False)
class Member:
    """One node of the cluster, as the engine has it."""

    name: str
    container: Any  # the Docker client is not typed
    host: str
    port: int
    management_port: int
    is_away: bool = False  # killed, or cut off from the others, or not yet back


@dataclass(eq=False)
class Cluster:
    """The engine of a whole cluster. What asks it something asks a node that is with the majority."""

    origin: str = f"cluster of {len(NODES)} containers {IMAGE}"
    _members: dict[str, Member] = field(default_factory=dict)
    _network: Any = None
    _leash: Leash | None = None

    def start(self) -> None:
        if not self._members:
            self._create()
        for member in self._members.values():
            member.container.start()
            member.is_away = False

    def _create(self) -> None:
        docker = docker_client()
        if docker is None:
            raise NoBroker("no cluster: no Docker engine answers")
        client: Any = docker.client
        host = "127.0.0.1" if docker.host() == "localhost" else docker.host()
        label = f"eventbus-{secrets.token_hex(4)}"
        # First: what follows may be broken off.
        self._leash = Leash([sys.executable, "-c", REMOVE, label])
        # Internal: no way out, so a node that is taken off it cannot reach the others by another way either.
        self._network = client.networks.create(label, internal=True, labels={label: ""})
        environment = {"RABBITMQ_ERLANG_COOKIE": secrets.token_hex(16)}
        files = _archive({"etc/rabbitmq/conf.d/20-cluster.conf": CONFIGURATION})
        if not image_is_here(IMAGE):
            client.images.pull(IMAGE)
        for name in NODES:
            port, management_port = free_port(), free_port()
            outside = {"5672/tcp": port, "15672/tcp": management_port}
            container = client.containers.create(
                IMAGE,
                hostname=name,
                environment=environment | {"RABBITMQ_NODENAME": f"rabbit@{name}"},
                ports={inside: (host, it) if host == "127.0.0.1" else it for inside, it in outside.items()},
                labels=[label],
                mem_limit="1g",
            )
            container.put_archive("/", files)
            self._network.connect(container, aliases=[name])
            self._members[name] = Member(name, container, host, port, management_port)

    def discard(self) -> None:
        if self._leash is not None:
            self._leash.let_go()
            self._leash = None
            self._members.clear()

    def kill(self) -> None:
        for name in NODES:
            self.kill_node(name)

    def shut_down(self) -> None:
        for member in self._members.values():
            member.container.stop(timeout=int(CTL_S))
            member.is_away = True

    # ── one node ──────────────────────────────────────────────────────────────────────────────────────────────────

    def kill_node(self, name: str) -> None:
        member = self._members[name]
        member.is_away = True
        member.container.kill()
        member.container.wait(timeout=CTL_S)

    def start_node(self, name: str) -> None:
        self._members[name].container.start()

    def cut_off(self, name: str) -> None:
        """Take the node off the network that the nodes share: nobody is told, packets just do not arrive."""
        member = self._members[name]
        member.is_away = True
        self._network.disconnect(member.container)

    def heal(self, name: str) -> None:
        self._network.connect(self._members[name].container, aliases=[name])

    def all_are_back(self) -> None:
        """From here on any node may be asked."""
        for member in self._members.values():
            member.is_away = False

    def address_of(self, name: str) -> tuple[str, int]:
        """Where clients reach the node."""
        member = self._members[name]
        return member.host, member.port

    # ── asking it ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        host, port = self.address_of(NODES[0])
        return f"amqp://guest:guest@{host}:{port}/"

    @property
    def management_url(self) -> str:
        member = self._in_majority()
        return f"http://{member.host}:{member.management_port}"

    def ctl(self, *args: str) -> str:
        member = self._in_majority()
        code, (out, err) = member.container.exec_run(["rabbitmqctl", *args], demux=True)
        if code != 0:
            told = (err or out or b"").decode().strip()
            raise ServerError(f"rabbitmqctl {' '.join(args)} on node {member.name} of the {self.origin}: {told}")
        return (out or b"").decode()

    def log_tail(self) -> str:
        return "\n".join(
            f"{name}: {member.container.logs(tail=20).decode(errors='replace')}"
            for name, member in self._members.items()
        )

    def _in_majority(self) -> Member:
        for member in self._members.values():
            if not member.is_away:
                return member
        raise ServerError(f"the {self.origin} is down")


def _archive(files: dict[str, str]) -> bytes:
    """A tar of *files*, as the engine takes it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


@dataclass(frozen=True, slots=True)
class Members:
    """Where one queue is; the names are as in `NODES`."""

    leader: str  # empty while there is none
    online: frozenset[str]


class ClusterServer(BrokerServer):
    """A cluster as a test sees it."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        super().__init__(self.cluster)

    @property
    def line(self) -> str:
        return LINE

    def running(self) -> ClusterServer:
        """Itself, started if it was not."""
        if not self.is_running:
            self.start()
        return self

    def start(self) -> None:
        super().start()
        try:
            self.wait_for_nodes()
        except ServerError:
            self.discard()
            raise

    def wait_for_nodes(self) -> None:
        """Return when every node runs, sees every other one, and lets clients in."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            seen = self._nodes_seen()
            if len(seen) == len(NODES) and all(self._lets_clients_in(name) for name in NODES):
                self.cluster.all_are_back()
                return
            time.sleep(0.2)
        told = self.cluster.log_tail()
        raise ServerError(f"only {', '.join(seen)} of the cluster ran after {START_S:.0f} s; the logs end:\n{told}")

    def _nodes_seen(self) -> Sequence[str]:
        """The nodes that the one that answers is in a cluster with; it may not be ready to answer."""
        try:
            nodes = self.api("GET", "/nodes?columns=name,running,partitions")
        except (ServerError, OSError, http.client.HTTPException):
            return ()
        assert isinstance(nodes, list)
        return [node["name"] for node in nodes if node.get("running") and not node.get("partitions")]

    def _lets_clients_in(self, name: str) -> bool:
        host, port = self.cluster.address_of(name)
        return ask_version(f"amqp://{host}:{port}/") is not None

    def members(self, url: str) -> dict[str, Members]:
        """Where each queue of *url*'s virtual host is, as its leader knows it now."""
        columns = ("name", "leader", "online")
        told = self.ctl("list_queues", "-p", vhost_of(url), "--formatter", "json", *columns)
        return {
            queue["name"]: Members(_short(queue["leader"]), frozenset(map(_short, queue["online"])))
            for queue in json.loads(told)
        }


def _short(node: str) -> str:
    """`rabbit@one` is `one`."""
    return node.partition("@")[2]
