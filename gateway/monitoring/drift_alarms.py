"""What a drift leads to: an alarm with the streams, a picture and example studies, and a review task for a person.

An alarm is open until a later window is as the reference was, or another version serves
(gateway/monitoring/drift_closing.py). A task is opened with the alarm, and again where a warning becomes critical; a
person closes it. Somebody who keeps an alarm quiet keeps a warning quiet: a critical drift is a new alarm. What differs
from the training data is an alarm of its own, so that taking it on hides nothing else.
A new critical drift pauses the model where learning.toml says so; whoever resumes it is not overruled the next night.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.bundle import load_bundle
from engine.drift_check import StreamPair
from engine.errors import BundleInvalid
from engine.intensity_baseline import IntensityBaseline
from gateway.learning.pauses import pause
from gateway.learning.serving import overtaken
from gateway.learning_settings import LearningSettings
from gateway.monitoring.drift_closing import DRIFT, TRAINING_DATA
from gateway.monitoring.drift_pictures import draw_streams, picture_path
from gateway.monitoring.drift_window import ModelDrift, check_model, served_versions
from gateway.monitoring.review_tasks import open_task, open_task_of
from gateway.settings import DriftSettings
from storage import alarms, ledger
from storage.database import Database
from storage.errors import ModelMissing
from storage.models import ModelRegistry
from storage.records import Alarm, utc_now

KIND, KIND_TRAINING = DRIFT, TRAINING_DATA
_BY = "scheduler"
_log = structlog.get_logger(__name__)

Baselines = Callable[[str, str], IntensityBaseline | None]
"""Of a model's name and version, the baseline in its bundle; None where it has none, or there is no such bundle."""


@dataclass(frozen=True, kw_only=True)
class DriftWatch:
    """The job `drift`. Pictures lie below `state_dir`."""

    database: Database
    settings: DriftSettings
    learning: LearningSettings
    state_dir: Path
    baselines: Baselines

    def run(self) -> tuple[str, list[ModelDrift]]:
        """`check` now: a sentence on what was found, and what it was. Raises DatabaseAway."""
        found = self.check(now=utc_now())
        drifted = [f"{one.model_name} {one.model_version}" for one in found if one.report.severity != "none"]
        unlike = [f"{one.model_name} {one.model_version}" for one in found if one.unlike_training]
        few = sum(one.report.too_few is not None for one in found)
        said = f"{len(found)} comparisons, {few} with too few studies; drifted: {', '.join(drifted) or 'none'}"
        return f"{said}; unlike the training data: {', '.join(unlike) or 'none'}", found

    def check(self, *, now: datetime) -> list[ModelDrift]:
        """Of every model the version that serves; alarms are raised and cleared, tasks opened."""
        found: list[ModelDrift] = []
        with self.database.reading() as session:
            served = served_versions(session)
        for name, version in served:
            baseline = self.baselines(name, version)
            with self.database.reading() as session:
                drifts = check_model(session, name, version, self.settings, now=now, baseline=baseline)
            for drift in drifts:
                pictures = draw_drift(drift, self.state_dir)
                with self.database.session() as session:
                    tell(session, drift, pictures, pauses_model=self.learning.of(name).on_drift == "pause")
            found += drifts
        return found


def bundle_baselines(registry: ModelRegistry) -> Baselines:
    """From the registered bundles; one that cannot be read is logged, and its model compared with nothing."""

    def baseline_of(name: str, version: str) -> IntensityBaseline | None:
        try:
            return load_bundle(registry.get(name, version).folder, verify=False).evidence.baseline
        except ModelMissing:
            return None
        except BundleInvalid as error:
            _log.error("no comparison with the training data", model=f"{name} {version}", error=str(error))
            return None

    return baseline_of


def draw_drift(drift: ModelDrift, state_dir: Path) -> dict[str, str]:
    """By kind of alarm the picture that was drawn for it, below the state folder. Raises OSError."""
    drawn = {}
    for kind in (KIND, KIND_TRAINING):
        relative = picture_path(kind, drift.subject)
        if draw_kind(drift, kind, state_dir / relative):
            drawn[kind] = relative
    return drawn


def draw_kind(drift: ModelDrift, kind: str, path: Path) -> bool:
    """The picture of one kind of alarm; False where there is nothing to draw."""
    title = f"{drift.model_name} {drift.model_version}, {drift.scanner or 'all scanners'}"
    if kind == KIND:
        pairs: Sequence[StreamPair] = drift.pairs
        title = f"{title}: {drift.report.severity}"
        sides = (f"the first {drift.report.reference} studies", f"the last {drift.report.window} studies")
        edges = {}
    else:
        pairs = [finding.pair for finding in drift.unlike_training]
        title = f"{title}: unlike the training data"
        most = max((len(finding.members) for finding in drift.unlike_training), default=0)
        sides = ("the training data", f"the last {most} studies")
        edges = {finding.name: finding.edges for finding in drift.unlike_training}
    if pairs:
        draw_streams(pairs, path, title=title, sides=sides, edges=edges)
    return bool(pairs)


def tell(session: Session, drift: ModelDrift, pictures: dict[str, str], *, pauses_model: bool) -> None:
    """Raise the alarms and open or update the tasks, or clear the alarms where an answer says that all is well.
    `pauses_model`: so does a new critical drift. Nothing is said of a version that no longer serves."""
    ledger.hold(session, ledger.model_subject(drift.model_name))  # first, as a promotion does
    if overtaken(session, drift.model_name, drift.model_version):
        return
    if drift.report.severity != "none":
        examples = [one for finding in drift.report.drifted for one in drift.examples[finding.name]]
        is_new = _tell_one(session, drift, KIND, describe(drift), examples, pictures.get(KIND))
        if is_new and drift.report.severity == "critical" and pauses_model:
            streams = ", ".join(finding.name for finding in drift.report.drifted)
            pause(session, drift.model_name, by="policy", reason=f"critical drift in {streams}")
    elif drift.report.too_few is None:
        alarms.clear_alarms(session, kind=KIND, subject=drift.subject, by=_BY)
    if drift.unlike_training:
        examples = [one for finding in drift.unlike_training for one in drift.examples[finding.name]]
        _tell_one(session, drift, KIND_TRAINING, describe_training(drift), examples, pictures.get(KIND_TRAINING))
    elif drift.training:
        alarms.clear_alarms(session, kind=KIND_TRAINING, subject=drift.subject, by=_BY)


def _tell_one(
    session: Session, drift: ModelDrift, kind: str, message: str, examples: Sequence[str], picture: str | None
) -> bool:
    """Whether the alarm is a new one."""
    before = session.scalars(
        select(Alarm).where(Alarm.kind == kind, Alarm.subject == drift.subject, Alarm.cleared_at.is_(None)).limit(1)
    ).first()
    if before is not None and before.message.startswith("warn") and message.startswith("critical"):
        # Who has taken on a warning has not seen this.
        alarms.clear_alarms(session, kind=kind, subject=drift.subject, by=_BY)
    is_new = alarms.raise_alarm(session, kind=kind, subject=drift.subject, message=message).count == 1
    if is_new or open_task_of(session, kind=kind, subject=drift.subject) is not None:
        open_task(
            session,
            kind=kind,
            model_name=drift.model_name,
            model_version=drift.model_version,
            subject=drift.subject,
            summary=message,
            result_ids=list(dict.fromkeys(examples)),
            picture=picture,
        )
    return is_new


def describe(drift: ModelDrift) -> str:
    """Severity, streams and example results of a drift, for an alarm."""
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


def describe_training(drift: ModelDrift) -> str:
    """The same of what differs from the training data."""
    parts = [
        f"{finding.name} (warn, KL {finding.kl:.3f}, {len(finding.members)} studies; "
        f"e.g. {', '.join(drift.examples[finding.name])})"
        for finding in drift.unlike_training
    ]
    return (
        f"warn: the latest studies do not have the intensities that the model was trained on: {'; '.join(parts)}. "
        "Another scanner or protocol than those of the training may be the reason: look at results, then acknowledge it"
    )
