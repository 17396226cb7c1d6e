"""When a failed attempt is made again: attempt -> delay. Pure; randomness is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

from eventbus.errors import SetupError

# What the delay tree can hold (`delay.LONGEST` is a little more; a test compares them).
LONGEST = timedelta(days=42)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often, and how far apart, a handler is tried.

    *attempts* counts the first one. The wait after attempt *n* is *delay* times *factor* to the power of n - 1, at
    most *max_delay*, and up to *jitter* (a share: 0.25 is a quarter) more or less, so that what failed together is
    not tried together again.

    Raises:
        SetupError: a value that cannot be.
    """

    attempts: int = 10
    delay: timedelta = timedelta(seconds=1)
    factor: float = 3.0
    max_delay: timedelta = timedelta(minutes=10)
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if not _is_whole(self.attempts) or self.attempts < 1:
            raise SetupError(f"Retry(attempts={self.attempts!r}): give a whole number from 1, the first try included")
        if not _is_number(self.factor) or not 1 <= self.factor < math.inf:
            raise SetupError(f"Retry(factor={self.factor!r}): give 1 (always the same delay) or more")
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise SetupError(f"Retry(jitter={self.jitter!r}): give a share of the delay from 0 to 1")
        for name, value in (("delay", self.delay), ("max_delay", self.max_delay)):
            if not isinstance(value, timedelta):
                raise SetupError(f"Retry({name}={value!r}): give a timedelta, like timedelta(seconds=5)")
            if not timedelta(0) <= value <= LONGEST:
                raise SetupError(f"Retry({name}={value!r}): give a delay from 0 to {LONGEST.days} days")
        if self.delay > self.max_delay:
            raise SetupError(
                f"Retry(delay={self.delay!r}) is over max_delay={self.max_delay!r}, which would cut it: raise max_delay"
            )

    def delay_after(self, attempt: int, *, jitter: float = 0.0) -> timedelta:
        """How long to wait after *attempt* (from 1) failed. *jitter*: the randomness, from -1 to 1."""
        if self.delay == timedelta(0):
            return self.delay
        try:
            delay = min(self.delay * float(self.factor) ** (attempt - 1), self.max_delay)
        except OverflowError:  # beyond any float or timedelta, and so beyond max_delay
            delay = self.max_delay
        return min(delay * (1 + self.jitter * jitter), LONGEST)

    def __str__(self) -> str:
        if self.attempts == 1:
            return "1 attempt, no retry"
        if self.factor == 1 or self.delay == self.max_delay:
            return f"{self.attempts} attempts, {_said(self.delay)} apart"
        return f"{self.attempts} attempts, {_said(self.delay)} \u00d7 {self.factor:g} up to {_said(self.max_delay)}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _said(delay: timedelta) -> str:
    """*delay* as a person would say it: the largest unit of which there is at least one."""
    seconds = delay.total_seconds()
    for name, size_s in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= size_s:
            return f"{round(seconds / size_s, 2):g} {name}"
    return f"{seconds * 1000:g} ms"
