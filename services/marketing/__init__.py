"""Marketing: keeps the mailing list."""
