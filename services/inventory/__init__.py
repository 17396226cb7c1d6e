"""Inventory: sets the goods of an order aside, all or nothing; puts them back when the payment is declined."""
