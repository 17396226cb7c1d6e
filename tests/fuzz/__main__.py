"""`python -m tests.fuzz --seconds 600`: as many cases as fit; exit code 1 and how to repeat it at the first finding."""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sys
import time
import traceback

from tests.fuzz.cases import Case
from tests.fuzz.lanes import Pair

SHOWN_S = 1.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long; 60 if left out")
    parser.add_argument("--frames", type=int, help="how many at most; as many as fit if left out")
    parser.add_argument("--seed", type=int, help="the first case's; each further one's is 1 more; random if left out")
    return parser.parse_args()


async def _fuzz(seed: int, seconds: float, most_frames: int | None) -> int:
    began_s = shown_s = time.monotonic()
    cases = frames = 0
    pair = await Pair.open()
    while (now_s := time.monotonic()) - began_s < seconds and (most_frames is None or frames < most_frames):
        case = Case(seed + cases)
        try:
            await case.run(pair)
        except BaseException as error:  # whatever it is: this case, and no other, is to be told
            if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
                raise
            print(f"\nfinding, again with: python -m tests.fuzz --seed {seed + cases}", file=sys.stderr)
            traceback.print_exception(error, file=sys.stderr)
            print(f"bytes: {case.data.hex()}", file=sys.stderr)
            return 1
        cases += 1
        frames += case.frames
        if sys.stderr.isatty() and now_s - shown_s > SHOWN_S:
            shown_s = now_s
            print(f"\r{_sum(cases, frames, now_s - began_s)}", end="", file=sys.stderr, flush=True)
    await pair.close()
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    taken_s = time.monotonic() - began_s
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"{_sum(cases, frames, taken_s)}; {peak_mib} MiB at most; seed {seed}")
    print("no finding: each frame and cut read as pamqp reads it")
    return 0


def _sum(cases: int, frames: int, seconds: float) -> str:
    return f"{frames:,} frames in {cases:,} cases, {seconds:.0f} s, {frames / (seconds or 1):,.0f} frames/s"


def main() -> int:
    arguments = _arguments()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    try:
        return asyncio.run(_fuzz(seed, arguments.seconds, arguments.frames))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
