"""`eventbus version`: what runs here, and who answers there."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from eventbus.cli import output
from eventbus.cli.connection import Namespace, Place, Url, complete, connected, find, read_settings

if TYPE_CHECKING:
    from eventbus.transport.base import Broker


def version(url: Url = None, namespace: Namespace = None, as_json: output.Json = False) -> None:
    """Say which eventbus, Python and aio-pika this is, and which broker answers where a URL is given."""
    from importlib.metadata import version as installed

    versions = {
        "eventbus": installed("eventbus"),
        "python": platform.python_version(),
        "aio-pika": installed("aio-pika"),
    }
    if not as_json:
        for name, number in versions.items():
            output.say(f"{name:<9} {number}")
    url = url or read_settings().url
    has_broker = url is not None and not url.startswith("memory:")
    broker = complete(_ask(find(url, namespace))) if has_broker else None
    if as_json:
        output.say_json(versions | {"broker": _as_json(broker)})
    elif broker is not None:
        output.say(f"{'broker':<9} {broker.product} {broker.version} at {broker.host}:{broker.port}")


async def _ask(place: Place) -> Broker:
    from eventbus.topology import Topology

    async with connected(place, Topology(()), "never") as transport:
        return transport.broker


def _as_json(broker: Broker | None) -> dict[str, object] | None:
    if broker is None:
        return None
    return {"product": broker.product, "version": broker.version, "host": broker.host, "port": broker.port}
