"""Events that leave exactly when the change that they tell of is committed.

`Outbox` writes an event into your transaction, `Relay` publishes what was committed. The table is documented in
`eventbus.database`, so that a service in another language can write to it.
"""

from eventbus.outbox.relay import Relay
from eventbus.outbox.sql import Outbox

__all__ = ["Outbox", "Relay"]
