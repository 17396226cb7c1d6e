"""`python -m services.demo`: what `eventbus demo` runs."""

import argparse
import sys

from services.demo import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m services.demo", description="Watch a small shop live on events.")
    parser.add_argument("--url", help="a broker; without it one of its own")
    parser.add_argument("--keep", action="store_true", help="leave the shop up afterwards, until Ctrl-C")
    parser.add_argument("--sabotage", choices=("lose", "twice"), help="break a promise, to see that it is noticed")
    parser.add_argument("--json", action="store_true", dest="as_json", help="the figures as JSON, for scripts")
    sys.exit(main(**vars(parser.parse_args())))
