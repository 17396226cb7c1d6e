"""The shop's events: the only thing that its services share.

One module per bounded context, and one list of what exists. A service imports its events from here, so that there is
one definition of each. An addition with a default needs no new version; a change that an old reader would misread is
a class of its own with the next `version`, beside the old one.
"""

from eventbus import Catalogue
from schemas.identity import UserRegistered
from schemas.inventory import StockRejected, StockReleased, StockReserved
from schemas.orders import OrderCancelled, OrderLine, OrderPlaced
from schemas.payments import PaymentCaptured, PaymentDeclined, PaymentRefunded
from schemas.shipping import OrderShipped
from schemas.values import Money

__all__ = [
    "CATALOGUE",
    "Money",
    "OrderCancelled",
    "OrderLine",
    "OrderPlaced",
    "OrderShipped",
    "PaymentCaptured",
    "PaymentDeclined",
    "PaymentRefunded",
    "StockRejected",
    "StockReleased",
    "StockReserved",
    "UserRegistered",
]

CATALOGUE = Catalogue(
    UserRegistered,
    OrderPlaced,
    OrderCancelled,
    PaymentCaptured,
    PaymentDeclined,
    PaymentRefunded,
    StockReserved,
    StockRejected,
    StockReleased,
    OrderShipped,
)
