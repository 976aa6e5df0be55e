"""Which studies are compared with which: reference and window of a model's version, of all scanners and of each.

The reference are the first studies that a version served, frozen from then on; a version that is promoted starts with
an empty one. The window are the latest studies of the last days, at most half as many as the reference. The latest
studies, whether they belong to the reference or not, are compared with the training data too, as far as the bundle
brings a baseline. What an answer leads to: gateway/monitoring/drift_alarms.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, union_all
from sqlalchemy.orm import Session

from engine.drift_check import (
    DriftReport,
    StreamPair,
    StudyRow,
    check_drift,
    largest_window,
    most_unlike,
    stream_pair,
)
from engine.intensity_baseline import IntensityBaseline
from engine.training_comparison import TrainingFinding, compare_with_training, histogram_stream
from gateway.monitoring.drift_closing import drift_subject
from gateway.monitoring.study_rows import PARTS, RecordedStudy, recorded_studies, study_rows
from gateway.settings import DriftSettings
from storage.deletion_records import PastFacts
from storage.learning_records import ServingPeriod
from storage.records import StudyFacts


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelDrift:
    """`scanner` None: the studies of all scanners together. `pairs`: of each stream that has drifted, both sides.
    `training`: against the training data, empty where the bundle has no baseline or too few studies were seen.
    `examples`: of each stream that is beyond its limit, the result ids of the studies that are furthest."""

    model_name: str
    model_version: str
    scanner: str | None
    report: DriftReport
    pairs: tuple[StreamPair, ...]
    training: tuple[TrainingFinding, ...]
    examples: dict[str, tuple[str, ...]]

    @property
    def subject(self) -> str:
        """Of alarms and review tasks."""
        return drift_subject(self.model_name, self.model_version, self.scanner)

    @property
    def unlike_training(self) -> tuple[TrainingFinding, ...]:
        return tuple(finding for finding in self.training if finding.severity != "none")

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing to tell anybody."""
        return self.report.severity == "none" and not self.unlike_training


def served_versions(session: Session) -> list[tuple[str, str]]:
    """Name and version of what serves, or of what served last, of every model that was run on a study, by name."""
    facts = union_all(
        *(select(table.model_name, table.model_version, table.recorded_at) for table in (StudyFacts, PastFacts))
    ).subquery()
    newest = select(facts.c.model_name, func.max(facts.c.recorded_at).label("at")).group_by(facts.c.model_name)
    latest = newest.subquery()
    rows = session.execute(
        select(facts.c.model_name, facts.c.model_version)
        .join(latest, (facts.c.model_name == latest.c.model_name) & (facts.c.recorded_at == latest.c.at))
        .order_by(facts.c.model_name, facts.c.model_version)
    )
    served: dict[str, str] = dict((name, version) for name, version in rows)
    now = session.execute(
        select(ServingPeriod.model_name, ServingPeriod.model_version).where(ServingPeriod.ended_at.is_(None))
    )
    # Also where it has seen no study yet.
    serving: dict[str, str] = dict((name, version) for name, version in now)
    return [(name, serving.get(name, version)) for name, version in served.items()]


def check_model(
    session: Session,
    model_name: str,
    model_version: str,
    settings: DriftSettings,
    *,
    now: datetime,
    baseline: IntensityBaseline | None = None,
) -> list[ModelDrift]:
    """All scanners together first, then each that has enough studies for an answer. `baseline`: of the bundle."""
    studies = recorded_studies(session, model_name, model_version)
    groups: dict[str | None, _Chosen] = {None: _choose(studies, settings, now)}
    scanners = sorted({study.scanner for study in studies if study.scanner})
    if len(scanners) > 1:
        for scanner in scanners:
            groups[scanner] = _choose([study for study in studies if study.scanner == scanner], settings, now)
    needed = {study.result_id for chosen in groups.values() for study in chosen.all}
    rows = study_rows(session, sorted(needed))
    model = (model_name, model_version)
    found = [_checked(chosen, rows, scanner, model, baseline) for scanner, chosen in groups.items()]
    return [one for one in found if one.scanner is None or one.report.too_few is None or one.training]


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Studies that are compared: the reference with the window `live`, and the `recent` ones with the training data."""

    reference: Sequence[RecordedStudy]
    live: Sequence[RecordedStudy]
    recent: Sequence[RecordedStudy]

    @property
    def all(self) -> tuple[RecordedStudy, ...]:
        return (*self.reference, *self.live, *self.recent)


def _choose(studies: Sequence[RecordedStudy], settings: DriftSettings, now: datetime) -> _Chosen:
    since = now - timedelta(days=settings.window_days)
    reference, later = studies[: settings.reference_studies], studies[settings.reference_studies :]
    recent = [study for study in studies if study.recorded_at >= since]
    return _Chosen(
        reference=reference,
        live=[study for study in later if study.recorded_at >= since][-max(1, largest_window(len(reference))) :],
        recent=recent[-max(1, largest_window(settings.reference_studies)) :],
    )


def _checked(
    chosen: _Chosen,
    rows: Mapping[str, StudyRow],
    scanner: str | None,
    model: tuple[str, str],
    baseline: IntensityBaseline | None,
) -> ModelDrift:
    live, recent = chosen.live, chosen.recent
    known, seen = [rows[study.result_id] for study in chosen.reference], [rows[study.result_id] for study in live]
    report = check_drift(known, seen)
    pairs = tuple(stream_pair(known, seen, finding.name) for finding in report.drifted)
    examples = {pair.name: tuple(live[index].result_id for index in most_unlike(pair)) for pair in pairs}
    training = () if baseline is None else _against_training([rows[study.result_id] for study in recent], baseline)
    for finding in training:
        if finding.severity != "none":
            places = [finding.members[index] for index in most_unlike(finding.pair)]
            examples[finding.name] = tuple(recent[place].result_id for place in places)
    return ModelDrift(
        model_name=model[0],
        model_version=model[1],
        scanner=scanner,
        report=report,
        pairs=pairs,
        training=training,
        examples=examples,
    )


def _against_training(rows: Sequence[StudyRow], baseline: IntensityBaseline) -> tuple[TrainingFinding, ...]:
    histograms = {
        (channel, part): [row.histograms.get(histogram_stream(channel, part)) for row in rows]
        for channel in range(len(baseline.channels))
        for part in PARTS
    }
    return compare_with_training(histograms, baseline)
