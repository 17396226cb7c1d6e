"""What happens to a delivery: an outcome goes in, a settlement comes out.

`decide` is the whole rule, pure and on one screen. Carrying it out (publish the copy, then ack) is `consumer`'s. Every
settlement but `Nothing` ends with the original acked, or rejected where no copy of it can be published.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, assert_never

from eventbus.delay import LONGEST
from eventbus.retry import Retry

Reason = Literal[
    "rejected", "exhausted", "invalid-envelope", "unknown-version", "invalid-data", "no-handler", "delivery-limit"
]
# A duplicate that arrives while its twin is being handled looks again after this long at most.
LONGEST_WAIT_FOR_A_CLAIM = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Handled:
    """The handler returned."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """This handler has handled this event before."""


@dataclass(frozen=True, slots=True)
class ClaimedElsewhere:
    """Another worker is handling it now; its lease ends in *lease_left* unless renewed."""

    lease_left: timedelta


@dataclass(frozen=True, slots=True)
class Refused:
    """No attempt can ever succeed: it does not decode, does not validate, or the handler raised `Reject`."""

    reason: Literal["invalid-envelope", "invalid-data", "rejected"]
    error: str


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Nothing in this program can take it. A newer worker may: hence the retries before it is given up."""

    reason: Literal["no-handler", "unknown-version"]
    error: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler raised, timed out, or its worker died in the middle.

    *trace* is the formatted traceback, *kind* the class of what was raised.
    """

    error: str
    trace: str = ""
    kind: str = "Failed"


@dataclass(frozen=True, slots=True)
class Postponed:
    """The handler raised `RetryLater`."""

    delay: timedelta
    error: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The worker is stopping; the handler did not end by itself."""


@dataclass(frozen=True, slots=True)
class StoreDown:
    """The idempotency store did not answer; the handler was not run."""

    error: str


Outcome = Handled | Duplicate | ClaimedElsewhere | Refused | Unmatched | Failed | Postponed | Cancelled | StoreDown


@dataclass(frozen=True, slots=True)
class Ack:
    """The broker forgets it."""


@dataclass(frozen=True, slots=True)
class Again:
    """A copy comes back to this handler after *delay*, as attempt *attempt*."""

    delay: timedelta
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A copy goes to the service's dead letters."""

    reason: Reason
    error: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Nothing:
    """Neither acked nor published: the broker delivers it again once this session has ended."""


Settlement = Ack | Again | DeadLetter | Nothing


def decide(outcome: Outcome, attempt: int, policy: Retry, *, jitter: float = 0.0) -> Settlement:
    """What becomes of a delivery on its *attempt* (1 is the first), given what happened.

    *jitter*, from -1 to 1, is the randomness that the policy spreads its delays with.
    """
    match outcome:
        case Handled() | Duplicate():
            return Ack()
        case ClaimedElsewhere(lease_left=left):
            return Again(max(timedelta(0), min(left, LONGEST_WAIT_FOR_A_CLAIM)), attempt, "claimed by another worker")
        case Refused(reason=reason, error=error):
            return DeadLetter(reason, error)
        case Unmatched(reason=given_up, error=error):
            if attempt < policy.attempts:
                return Again(policy.delay_after(attempt, jitter=jitter), attempt + 1, error)
            return DeadLetter(given_up, error)
        case Failed(error=error, trace=trace):
            if attempt < policy.attempts:
                return Again(policy.delay_after(attempt, jitter=jitter), attempt + 1, error)
            return DeadLetter("exhausted", error, trace)
        case Postponed(delay=delay, error=error):
            # It uses up an attempt: a handler that postpones for ever would otherwise never be noticed.
            if attempt < policy.attempts:
                return Again(min(delay, LONGEST), attempt + 1, error)
            return DeadLetter("exhausted", error)
        case Cancelled() | StoreDown():
            return Nothing()
        case _:
            assert_never(outcome)
