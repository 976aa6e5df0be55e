"""What is remembered of a destination: which encodings it takes, learned from its answers (OUT-44).

Kept as JSON in DestinationState.capability: {encoding: {"support", "since", "detail"}}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from gateway.delivery.destination import Support

# A PACS gets updates: after this time a refusal is forgotten and the preferred encoding is tried once more.
REFUSAL_HOLDS_FOR = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One encoding (or "SR"): accepted or refused, since when, and in the destination's words."""

    support: Support
    since: datetime
    detail: str


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Everything remembered of one destination."""

    lessons: Mapping[str, Lesson] = field(default_factory=dict)

    @classmethod
    def from_record(cls, capability: Mapping[str, Any] | None) -> Learned:
        return cls(
            lessons={
                name: Lesson(
                    support=entry["support"],
                    since=datetime.fromisoformat(entry["since"]),
                    detail=entry["detail"],
                )
                for name, entry in (capability or {}).items()
            }
        )

    def as_record(self) -> dict[str, Any]:
        return {
            name: {"support": lesson.support, "since": lesson.since.isoformat(), "detail": lesson.detail}
            for name, lesson in self.lessons.items()
        }

    def support(self, name: str, now: datetime) -> Support:
        lesson = self.lessons.get(name)
        if lesson is None or (lesson.support == "refused" and now - lesson.since >= REFUSAL_HOLDS_FOR):
            return "unknown"
        return lesson.support

    def learn(self, name: str, support: Support, detail: str, now: datetime) -> Learned:
        """The same with this lesson; an unchanged one keeps its time, an expired one gets a new."""
        if self.support(name, now) == support:
            return self
        lesson = Lesson(support=support, since=now, detail=detail)
        return replace(self, lessons={**self.lessons, name: lesson})

    def choose(self, encodings: Sequence[str], now: datetime, *, refused: Sequence[str] = ()) -> str | None:
        """The first encoding to try, in the configured order.

        Skips what this delivery has seen refused (`refused`) and what is remembered as refused. Where memory refuses
        all that is left, the first of it is tried nevertheless: a delivery is never parked on memory alone.
        """
        left = [e for e in encodings if e not in refused]
        return next((e for e in left if self.support(e, now) != "refused"), left[0] if left else None)
