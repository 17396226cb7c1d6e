"""Audit: writes down every event, undecoded, and changes nothing."""
