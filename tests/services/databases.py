"""A test module's mark, for what has to hold on both databases that the shop can have."""

import pytest

on_each_database = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)
