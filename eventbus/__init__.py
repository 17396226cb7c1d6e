"""A pub/sub event bus for event-driven Python microservices on RabbitMQ.

The whole public surface is this module's `__all__`, `eventbus.testing` and `eventbus.dead_letters`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eventbus.bus import Bus
    from eventbus.context import Context
    from eventbus.envelope import Envelope
    from eventbus.errors import (
        EnvelopeError,
        EventBusError,
        PartlyPublished,
        PublishError,
        PublishTimeout,
        Reject,
        RetryLater,
        SetupError,
        StoreError,
        TopologyConflict,
        TransportError,
        Unroutable,
    )
    from eventbus.event import Catalogue, Event
    from eventbus.idempotency import IdempotencyStore
    from eventbus.retry import Retry
    from eventbus.service import Handler, Service
    from eventbus.worker import Worker, run

__all__ = [
    "Bus",
    "Catalogue",
    "Context",
    "Envelope",
    "EnvelopeError",
    "Event",
    "EventBusError",
    "Handler",
    "IdempotencyStore",
    "PartlyPublished",
    "PublishError",
    "PublishTimeout",
    "Reject",
    "Retry",
    "RetryLater",
    "Service",
    "SetupError",
    "StoreError",
    "TopologyConflict",
    "TransportError",
    "Unroutable",
    "Worker",
    "run",
]

# Where each name lives. It is loaded when it is first asked for: the command line, which answers `--help` through this
# package, would otherwise wait for pydantic and OpenTelemetry first. (A test holds this against the imports above.)
_HOMES = {
    "bus": ("Bus",),
    "context": ("Context",),
    "envelope": ("Envelope",),
    "errors": (
        "EnvelopeError",
        "EventBusError",
        "PartlyPublished",
        "PublishError",
        "PublishTimeout",
        "Reject",
        "RetryLater",
        "SetupError",
        "StoreError",
        "TopologyConflict",
        "TransportError",
        "Unroutable",
    ),
    "event": ("Catalogue", "Event"),
    "idempotency": ("IdempotencyStore",),
    "retry": ("Retry",),
    "service": ("Handler", "Service"),
    "worker": ("Worker", "run"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # the next time, this function is not asked
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
