"""Mailbox: an SMTP server that keeps what it gets, and shows it over HTTP. It knows no events."""
