"""Marks for tests: what has to hold on both databases that the shop can have, and what is tried on the larger one."""

import pytest

on_each_database = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)
on_postgresql = pytest.mark.parametrize("settings", ["postgresql"], indirect=True)
