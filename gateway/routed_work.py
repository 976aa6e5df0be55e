"""What routing has asked for: which series go to which models, and which of these are urgent."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.intake.routing import Verdict
from storage.records import Result, RoutingDecision


def work_of(row: RoutingDecision | Result) -> tuple[str, str]:
    """What is done once per version: one series by one model."""
    return row.series_instance_uid, str(row.model if isinstance(row, RoutingDecision) else row.model_name)


def routed(session: Session, version_id: str) -> list[RoutingDecision]:
    """What sends a series of the version to a model, in the order of the rules."""
    decisions = session.scalars(
        select(RoutingDecision).where(RoutingDecision.version_id == version_id).order_by(RoutingDecision.decision_id)
    )
    return [d for d in decisions if d.matched or d.explanation.get("verdict") == Verdict.ALREADY_ROUTED]


def urgent_work(decisions: Sequence[RoutingDecision]) -> set[tuple[str, str]]:
    """The work of `routed` that a rule calls urgent."""
    return {work_of(d) for d in decisions if d.explanation.get("priority") == "urgent"}


def is_urgent(session: Session, result: Result) -> bool:
    """Whether a rule that sent the series of a result to its model says so."""
    return work_of(result) in urgent_work(routed(session, result.version_id))
