"""Which studies are compared with which: reference and window of a model's version, of all scanners and of each.

The reference are the first studies that a version served, frozen from then on; a version that is promoted starts with
an empty one. The window are the latest studies of the last days, at most half as many as the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from engine.drift_check import DriftReport, check_drift, largest_window, most_unlike
from gateway.monitoring.study_rows import RecordedStudy, recorded_studies
from gateway.settings import DriftSettings
from storage import alarms
from storage.database import Database
from storage.records import StudyFacts, utc_now

KIND = "drift"


@dataclass(frozen=True, kw_only=True)
class ModelDrift:
    """`scanner` None: the studies of all scanners together. `examples`: of each stream that has drifted, the result ids
    of the studies that are furthest."""

    model_name: str
    model_version: str
    scanner: str | None
    report: DriftReport
    examples: dict[str, tuple[str, ...]]


def check_served_models(database: Database, settings: DriftSettings, *, now: datetime) -> list[ModelDrift]:
    """Of every model the version of its latest study; alarms are raised and cleared. Raises DatabaseAway."""
    found: list[ModelDrift] = []
    with database.reading() as session:
        served = served_versions(session)
    for name, version in served:
        with database.session() as session:
            drifts = check_model(session, name, version, settings, now=now)
            for drift in drifts:
                raise_for(session, drift)
        found += drifts
    return found


def check_drift_of_all(database: Database, settings: DriftSettings) -> str:
    """`check_served_models` now, and a sentence on what was found. Raises DatabaseAway."""
    found = check_served_models(database, settings, now=utc_now())
    drifted = [f"{one.model_name} {one.model_version}" for one in found if one.report.severity != "none"]
    few = sum(one.report.too_few is not None for one in found)
    return f"{len(found)} comparisons, {few} with too few studies; drifted: {', '.join(drifted) or 'none'}"


def served_versions(session: Session) -> list[tuple[str, str]]:
    """Name and version of what served last, of every model that has served, by name."""
    newest = select(StudyFacts.model_name, func.max(StudyFacts.recorded_at).label("at")).group_by(StudyFacts.model_name)
    latest = newest.subquery()
    rows = session.execute(
        select(StudyFacts.model_name, StudyFacts.model_version)
        .join(latest, (StudyFacts.model_name == latest.c.model_name) & (StudyFacts.recorded_at == latest.c.at))
        .order_by(StudyFacts.model_name, StudyFacts.model_version)
    )
    return list(dict((name, version) for name, version in rows).items())


def check_model(
    session: Session,
    model_name: str,
    model_version: str,
    settings: DriftSettings,
    *,
    now: datetime,
) -> list[ModelDrift]:
    """All scanners together first, then each that has enough studies for an answer."""
    studies = recorded_studies(session, model_name, model_version)
    model = (model_name, model_version)
    found = [_checked(studies, None, model, settings, now)]
    scanners = sorted({study.scanner for study in studies if study.scanner})
    if len(scanners) > 1:
        for scanner in scanners:
            own = [study for study in studies if study.scanner == scanner]
            one = _checked(own, scanner, model, settings, now)
            if one.report.too_few is None:
                found.append(one)
    return found


def raise_for(session: Session, drift: ModelDrift) -> None:
    """An alarm where something has drifted; an open one of before is cleared where an answer says that nothing has."""
    subject = f"model:{drift.model_name} {drift.model_version}"[:160]
    if drift.scanner is not None:
        subject = f"{subject} on {drift.scanner}"[:160]
    if drift.report.severity != "none":
        alarms.raise_alarm(session, kind=KIND, subject=subject, message=describe(drift))
    elif drift.report.too_few is None:
        alarms.clear_alarms(session, kind=KIND, subject=subject, by="scheduler")


def describe(drift: ModelDrift) -> str:
    """Severity, streams and example results, for an alarm."""
    report = drift.report
    parts = []
    for finding in report.drifted:
        text = f"{finding.name} ({finding.severity}, {finding.multiple:.1f} times what is usual"
        if finding.kl is not None:
            text += f", KL {finding.kl:.3f}"
        parts.append(f"{text}; e.g. {', '.join(drift.examples[finding.name])})")
    return (
        f"{report.severity}: the last {report.window} studies differ from the first {report.reference} in "
        f"{'; '.join(parts)}"
    )


def _checked(
    studies: Sequence[RecordedStudy],
    scanner: str | None,
    model: tuple[str, str],
    settings: DriftSettings,
    now: datetime,
) -> ModelDrift:
    reference, later = studies[: settings.reference_studies], studies[settings.reference_studies :]
    since = now - timedelta(days=settings.window_days)
    live = [study for study in later if study.recorded_at >= since][-max(1, largest_window(len(reference))) :]
    known, seen = [study.row for study in reference], [study.row for study in live]
    report = check_drift(known, seen)
    return ModelDrift(
        model_name=model[0],
        model_version=model[1],
        scanner=scanner,
        report=report,
        examples={
            finding.name: tuple(live[index].result_id for index in most_unlike(known, seen, finding.name))
            for finding in report.drifted
        },
    )
