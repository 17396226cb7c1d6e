"""A program as it is, but for the step that kills it: `victim --at POINT --nth N -- MODULE ARGUMENTS...`."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from datetime import timedelta
from pathlib import Path

from tests.faults.kills import points, saboteurs
from tests.faults.ledger.processes import end_with_parent


def shorten_leases(lease: timedelta) -> None:
    """What the dead hold is free sooner: for tests that cannot wait for half a minute after each kill."""
    from eventbus import consumer
    from eventbus.outbox import leases, relay

    consumer.LEASE = lease  # type: ignore[attr-defined]  # it is the store's, and used here
    leases.LEASE = lease + timedelta(seconds=leases.MARGIN_S)
    relay.LOOK_S = lease.total_seconds() / 4


def main(options: argparse.Namespace) -> None:
    end_with_parent()
    for setting in options.set:
        name, _, value = setting.partition("=")
        os.environ[name] = value
    os.environ["EVENTBUS_LANE"] = "on"  # some of the steps are the lane's
    if options.lease_s:
        shorten_leases(timedelta(seconds=options.lease_s))
    if options.saboteur:
        saboteurs.ALL[options.saboteur]()
    if options.at:
        points.arm(options.at, options.nth, options.killed)
    module, *arguments = options.command
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", choices=list(points.POINTS))
    parser.add_argument("--nth", type=int, default=1)
    parser.add_argument("--killed", type=Path, help="where to write that the step was reached")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="into the environment")
    parser.add_argument("--lease-s", type=float)
    parser.add_argument("--saboteur", choices=list(saboteurs.ALL))
    parser.add_argument("command", nargs="+")
    main(parser.parse_args())
