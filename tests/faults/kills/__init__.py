"""Killed at every step: a shop's services die by SIGKILL, each step of their work in turn, and every order is counted.

    python -m tests.faults.kills [--orders N] [--kills N] [--store sqlite|postgresql]

`points.py` names the steps, `victim.py` is a program that dies at one of them, `small.py` and `shop.py` are whom it
happens to, `run.py` lets it happen, `count.py` turns what is left into figures, `saboteurs.py` proves that they can be
bad.
"""
