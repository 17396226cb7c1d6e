"""Events that leave exactly when the change that they tell of is committed.

`Outbox` writes an event into your transaction, `Relay` publishes what was committed. The README documents the
table, so that a service in another language can write to it.
"""

import eventbus.database  # noqa: F401  # first: where SQLAlchemy is missing, it says what to install
from eventbus.outbox.relay import Relay
from eventbus.outbox.sql import Outbox

__all__ = ["Outbox", "Relay"]
