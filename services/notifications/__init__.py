"""Notifications: writes mails to customers."""
