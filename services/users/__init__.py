"""Users: takes registrations over HTTP."""
