"""Shipping: sends the parcel once an order is paid and its goods are set aside."""
