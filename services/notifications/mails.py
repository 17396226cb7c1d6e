"""What the mails say. One function per event, from the event alone."""

from schemas import OrderCancelled, OrderPlaced, OrderShipped, UserRegistered
from services.notifications.smtp import Mail


def welcome(event: UserRegistered) -> Mail:
    return Mail(event.email, "Welcome to the shop", f"Hello {event.name},\n\nit is good to have you here.\n")


def confirmation(event: OrderPlaced) -> Mail:
    lines = "\n".join(f"  {line.quantity} x {line.sku} at {line.unit_price}" for line in event.lines)
    text = f"Thank you for your order {event.order_id}:\n\n{lines}\n\nTotal: {event.total}\n"
    return Mail(event.email, "We have your order", text)


def shipping_notice(event: OrderShipped) -> Mail:
    text = f"Your order {event.order_id} is on its way to:\n\n{event.address}\n\nTracking: {event.tracking}\n"
    return Mail(event.email, "Your order is on its way", text)


def cancellation(event: OrderCancelled) -> Mail:
    text = f"We are sorry: your order {event.order_id} is cancelled.\n\nWhy: {event.reason}\n"
    return Mail(event.email, "Your order is cancelled", text)
