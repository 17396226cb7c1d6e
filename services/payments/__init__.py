"""Payments: takes the money of an order once, or declines; gives it back when there is no stock."""
