"""When to try again: capped exponential backoff with jitter, and the circuit that lets one probe through (QUE-29).

Both are pure: the same delivery, attempt and time give the same answer, so that a recovered workflow repeats itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

_ATTEMPTS_BEYOND_PATIENCE = 3
_JITTER = 0.5  # a wait is drawn between (1 - _JITTER) and 1 times the step


def backoff_s(failures: int, *, first_retry_s: float, max_retry_s: float, key: str) -> float:
    """Seconds to wait after the `failures`-th failure in a row (counted from 1).

    Steps double from `first_retry_s` up to `max_retry_s`; the jitter comes from `key` (the delivery's id) and the
    count, so that many deliveries to one destination do not come back at the same moment.
    """
    step = _step_s(failures, first_retry_s, max_retry_s)
    drawn = int.from_bytes(hashlib.sha256(f"{key}:{failures}".encode()).digest()[:8]) / 2**64
    return step * (1 - _JITTER * drawn)


def _step_s(failures: int, first_retry_s: float, max_retry_s: float) -> float:
    doublings = min(max(failures, 1) - 1, 62)  # beyond, the power itself would overflow
    return min(max_retry_s, first_retry_s * 2.0**doublings)


def overdue_attempts(before: int, since: datetime, now: datetime, *, give_up_after_s: float) -> int:
    """How many failed attempts in a row, this one included, found the work older than its patience."""
    return before + 1 if now - since >= timedelta(seconds=give_up_after_s) else 0


def patience_ended(overdue: int) -> bool:
    """Whether work is given up. The age alone is not enough: a clock that jumps forward would park a whole backlog."""
    return overdue >= _ATTEMPTS_BEYOND_PATIENCE


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """Whether a destination is in use (closed) or down (open), since when, and how many probes it has missed.

    While it is open nobody but one probe per step of the schedule contacts the destination. The schedule is counted
    from `since`: steps that double from `first_retry_s` up to `max_retry_s`. Columns of DestinationState.
    """

    is_open: bool
    since: datetime
    failures: int

    def wait_s(self, now: datetime, *, first_retry_s: float, max_retry_s: float) -> float:
        """Seconds until this destination may be contacted; 0 = now (when open: after a successful `claim`).

        Never more than `max_retry_s`, whatever happened to the clock.
        """
        if not self.is_open:
            return 0.0
        since = min(self.since, now)
        due = since + timedelta(seconds=_schedule_s(self.failures, first_retry_s, max_retry_s))
        return min(max_retry_s, max(0.0, (due - now).total_seconds()))

    def righted(self, now: datetime, *, first_retry_s: float, max_retry_s: float) -> Circuit:
        """The circuit counted anew from `now` if the clock was set back: a probe that is due in more than one longest
        step was claimed by a clock that no longer holds. To be written, or the wait would start over each time."""
        if not self.is_open:
            return self
        due = self.since + timedelta(seconds=_schedule_s(self.failures, first_retry_s, max_retry_s))
        if self.since <= now and (due - now).total_seconds() <= max_retry_s:
            return self
        return Circuit(is_open=True, since=now, failures=1)

    def claim(self, now: datetime, *, first_retry_s: float, max_retry_s: float) -> Circuit:
        """The circuit with the probe that is due now taken, and those that were missed skipped.

        To be written only where the row still has the old `failures`: who loses that race waits `wait_s` again.
        """
        failures = self.failures + 1
        while self.since + timedelta(seconds=_schedule_s(failures, first_retry_s, max_retry_s)) <= now:
            failures += 1
        return Circuit(is_open=True, since=self.since, failures=failures)

    def failed(self, now: datetime) -> Circuit:
        """After a contact found the destination away: opens, or stays open (the claim has counted already)."""
        return self if self.is_open else Circuit(is_open=True, since=now, failures=1)

    def succeeded(self, now: datetime) -> Circuit:
        """After any contact that was answered: closed."""
        return Circuit(is_open=False, since=now, failures=0) if self.is_open else self


def _schedule_s(failures: int, first_retry_s: float, max_retry_s: float) -> float:
    """When the probe after so many failures is due, in seconds from the first failure."""
    growing = 0.0
    for count in range(1, failures + 1):
        step = _step_s(count, first_retry_s, max_retry_s)
        if step >= max_retry_s:
            return growing + (failures - count + 1) * max_retry_s
        growing += step
    return growing
