"""RabbitMQ's management API: what AMQP cannot tell (bindings, arguments, policies, alarms), and unbinding.

Over `http.client`: a dozen requests of one command need no further dependency, and it follows no proxy variable and no
redirect, either of which would hand the broker's password on. Its figures (messages, and on lines before 4.3 the
effective policies) may be ten seconds old.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar  # Any: JSON as the broker writes it, read where it is looked into
from urllib.parse import quote

from yarl import URL

from eventbus.errors import SetupError, TransportError, hide_password
from eventbus.topology import Binding
from eventbus.transport.rabbitmq.refusals import Address
from eventbus.transport.rabbitmq.verify import Managed, Node, Policy, SeenExchange, SeenQueue

TIMEOUT_S: Final = 10.0
PORT: Final = 15672
TLS_PORT: Final = 15671

T = TypeVar("T")


class NotTold(TransportError):
    """The management API does not answer, or not to this user."""


def management_url(amqp: URL) -> URL:
    """Where the management API of the broker at *amqp* usually is. Never in the clear where AMQP is not."""
    scheme, port = ("https", TLS_PORT) if amqp.scheme == "amqps" else ("http", PORT)
    return URL.build(scheme=scheme, host=amqp.host or "localhost", port=port)


def _parsed(url: str) -> URL:
    try:
        parsed = URL(url)
        if parsed.scheme in ("http", "https") and parsed.host and parsed.port:
            return parsed
    except ValueError:  # its text may quote a part of the password
        pass
    raise SetupError(
        f"{hide_password(url)} is no URL of a management interface: use http://HOST:{PORT}, or https://"
    ) from None


class Management:
    """The virtual host of *amqp*, over the management API at *url*; with the login of *amqp* if *url* has none."""

    def __init__(self, amqp: str, url: str | None = None) -> None:
        broker = URL(amqp)
        self._url = _parsed(url) if url else management_url(broker)
        user, password = (self._url.user, self._url.password) if self._url.user else (broker.user, broker.password)
        self._user = user or "guest"
        self._login = base64.b64encode(f"{self._user}:{password or 'guest'}".encode()).decode()
        self._cafile = broker.query.get("cafile")
        self._vhost = quote(Address.of(broker).vhost, safe="")

    @property
    def where(self) -> str:
        return f"{self._url.scheme}://{self._url.host}:{self._url.port}"

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────

    def check_is_of(self, cluster: str) -> None:
        """See to it that this is the broker that calls itself *cluster* over AMQP.

        Raises:
            NotTold: it is another one (several may run on one host), or the API does not answer at all.
        """
        name = self._ask("GET", "/overview").get("cluster_name")
        if name != cluster:
            raise NotTold(f"the management interface at {self.where} is another broker's: {name}, not {cluster}")

    def read(self) -> Managed:
        """All that `verify` looks at; what this user is not told is left out, and named."""
        unread: dict[str, str] = {}

        def section(name: str, read: Callable[[], T]) -> T | None:
            try:
                return read()
            except NotTold as error:
                unread[name] = str(error)
                return None

        return Managed(
            queues=section("queues' types, arguments and effective policies", self.queues),
            exchanges=section("exchanges' types and arguments", self._exchanges),
            bindings=section("bindings", self.bindings),
            policies=section("policies' names", self._policies),
            nodes=section("the cluster's nodes", self._nodes),
            feature_flags=section("feature flags", self._feature_flags),
            alarms=section("alarms", self._alarms),
            unread=unread,
        )

    def queues(self) -> Mapping[str, SeenQueue]:
        """Every queue of the virtual host."""
        rows = {row["name"]: row for row in self._list("queues")}
        # 4.3 tells the effective policy of this very moment only where it is not asked for statistics.
        for row in self._list("queues", "?disable_stats=true&enable_queue_totals=true"):
            if row["name"] in rows:
                rows[row["name"]] |= {name: row[name] for name in ("effective_policy_definition",) if name in row}
        return {name: _queue(row) for name, row in rows.items()}

    def bindings(self) -> frozenset[Binding]:
        """Every binding of the virtual host but those of the default exchange, which are no one's to remove."""
        return frozenset(
            Binding(row["source"], row["destination"], row["destination_type"], row["routing_key"])
            for row in self._list("bindings")
            if row["source"]
        )

    def _exchanges(self) -> Mapping[str, SeenExchange]:
        return {
            row["name"]: SeenExchange(row["type"], row["durable"], row["arguments"], row.get("policy"))
            for row in self._list("exchanges")
        }

    def _policies(self) -> tuple[Policy, ...]:
        kinds = (("policies", False), ("operator-policies", True))
        return tuple(
            Policy(row["name"], row["definition"], is_operators)
            for kind, is_operators in kinds
            for row in self._list(kind)
        )

    def _nodes(self) -> tuple[Node, ...]:
        return tuple(
            Node(row["name"], bool(row.get("running")), tuple(row.get("partitions") or ()))
            for row in self._ask("GET", "/nodes")
        )

    def _feature_flags(self) -> Mapping[str, str]:
        """Those of what every broker of this version should have; an experiment may be off."""
        rows = self._ask("GET", "/feature-flags")
        return {row["name"]: row["state"] for row in rows if row.get("stability") != "experimental"}

    def _alarms(self) -> tuple[str, ...]:
        found = self._ask("GET", "/health/checks/alarms", accept=(200, 503))
        return tuple(f"{row.get('resource')} alarm on {row.get('node')}" for row in found.get("alarms") or ())

    # ── changing ────────────────────────────────────────────────────────────────────────────────────

    def bind(self, binding: Binding) -> None:
        """Make *binding*; one that is there stays as it is."""
        self._ask("POST", self._path_of(binding), {"routing_key": binding.routing_key, "arguments": {}})

    def unbind(self, bindings: Iterable[Binding]) -> None:
        """Remove *bindings*, whatever their arguments; those that are gone already are fine."""
        unwanted = set(bindings)
        for row in self._list("bindings"):
            found = Binding(row["source"], row["destination"], row["destination_type"], row["routing_key"])
            if found in unwanted:
                key = quote(row["properties_key"], safe="")
                self._ask("DELETE", f"{self._path_of(found)}/{key}", accept=(204, 404))

    def delete_queue(self, name: str) -> None:
        """Delete the queue with all that is in it; none of that name is fine."""
        self._ask("DELETE", f"/queues/{self._vhost}/{quote(name, safe='')}", accept=(204, 404))

    def _path_of(self, binding: Binding) -> str:
        kind = "q" if binding.destination_type == "queue" else "e"
        source, destination = quote(binding.source, safe=""), quote(binding.destination, safe="")
        return f"/bindings/{self._vhost}/e/{source}/{kind}/{destination}"

    # ── the wire ────────────────────────────────────────────────────────────────────────────────────

    def _list(self, what: str, query: str = "") -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._ask("GET", f"/{what}/{self._vhost}{query}")
        return rows

    def _ask(self, method: str, path: str, body: object = None, *, accept: tuple[int, ...] = (200, 201, 204)) -> Any:
        connection = self._connection()
        try:
            connection.request(
                method,
                f"{self._url.raw_path.rstrip('/')}/api{path}",
                None if body is None else json.dumps(body),
                {"Authorization": f"Basic {self._login}", "Content-Type": "application/json"},
            )
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise NotTold(
                f"no management interface answers at {self.where} ({error or type(error).__name__})"
            ) from error
        finally:
            connection.close()
        if response.status not in accept:
            raise NotTold(self._refusal(response.status))
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise NotTold(f"what answers at {self.where} is no management interface of RabbitMQ") from error

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._url.host or "localhost", self._url.port
        if self._url.scheme == "https":
            context = ssl.create_default_context(cafile=self._cafile)
            return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)

    def _refusal(self, status: int) -> str:
        if status in (401, 403):
            return f"user '{self._user}' may not ask the management interface at {self.where} for it"
        return f"the management interface at {self.where} said {status}"


def _queue(row: Mapping[str, Any]) -> SeenQueue:
    members = row.get("members") or ["itself"]
    return SeenQueue(
        type=row.get("type", "classic"),
        durable=row["durable"],
        arguments=row["arguments"],
        policy=row.get("effective_policy_definition") or {},
        state=row.get("state", "running"),
        members=len(members),
        online=len(row.get("online") or members),
        messages=row.get("messages", 0),
        unacked=row.get("messages_unacknowledged", 0),
        dlx=row.get("messages_dlx", 0),
    )
