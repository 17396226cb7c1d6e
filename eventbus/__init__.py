"""A pub/sub event bus for event-driven Python microservices on RabbitMQ.

The whole public surface is this module's `__all__`, `eventbus.testing` and `eventbus.dead_letters`.
"""

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
