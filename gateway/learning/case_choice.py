"""Which studies a model is to learn from next (ART-19, ART-21), and how many of them have labels.

Candidates are the recent results of all versions of a model that have the labels of the one that serves. Left out:
what failed a hard check of QA (garbage is no lesson), what a reader rejected or opened without a word, quarantined
studies, those of the canary, and what was learnt already. engine.case_selection chooses.

Cases drawn by chance are for monitoring alone: what readers say of them is the expected Dice of the version that serves
on cases that nobody picked. They are never trained on while that version serves, however unsure or corrected.

When enough of what was read had to be corrected (ART-26), the corrections are queued: each is learnt from next time,
whatever its confidence, also where a hard check failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.case_selection import Candidate, Why, select_cases
from engine.drift_check import StudyRow
from gateway import quarantine
from gateway.learning.corrections import USABLE, corrections_of_model, mean_dice
from gateway.learning_settings import ModelLearning
from gateway.monitoring.study_rows import study_row
from gateway.settings import CanarySettings
from storage.learning_records import Correction, LearningRun, ServingPeriod
from storage.records import Result, ResultState, Study, StudyFacts, StudyState

HARD_CHECKS = frozenset({"empty", "volume", "border", "laterality"})
"""Checks of QA (gateway/results/quality.py) whose hold means that the result is no segmentation of the organ; a hold
for want of confidence or agreement is what is looked for."""
_UNCERTAINTY = ("confidence", "border-entropy", "fold-dice", "mirror-dice")
"""Streams that say how sure a network was, and nothing of the case."""


@dataclass(frozen=True, kw_only=True)
class ChosenCase:
    """`confidence`: 1 - the mean over the labels of the entropy in and around each, None where it was not measured.
    `reading`: approved or corrected where right labels are there, None where a reader is waited for."""

    result_id: str
    study_instance_uid: str
    why: Why
    confidence: float | None
    scanner: str
    recorded_at: datetime
    verdict: str | None
    reading: str | None


@dataclass(frozen=True, kw_only=True)
class CaseChoice:
    """`cases` to be learnt from, the least sure first, then those drawn by chance.

    `read` results had a reader's word since they were last learnt from, `corrected` of them were corrected. `left_out`
    counts results by the reason why they are no candidates. `live_dice`: the mean Dice of the version that serves over
    the `live_cases` that were drawn by chance and read; an approved result counts as 1.
    """

    model_name: str
    model_version: str | None
    cases: tuple[ChosenCase, ...]
    candidates: int
    left_out: Mapping[str, int]
    read: int
    corrected: int
    least: int
    queued_from: float
    live_dice: float | None
    live_cases: int

    @property
    def to_learn(self) -> tuple[ChosenCase, ...]:
        """What a training takes: cases with labels that were not drawn for monitoring."""
        return tuple(case for case in self.cases if case.why != "random" and case.reading is not None)

    @property
    def waiting(self) -> tuple[ChosenCase, ...]:
        """Without labels: a reader is asked for them."""
        return tuple(case for case in self.cases if case.reading is None)

    @property
    def labelled(self) -> int:
        return len(self.to_learn)

    @property
    def corrected_share(self) -> float | None:
        """Of what was read; None where nothing was."""
        return self.corrected / self.read if self.read else None

    @property
    def corrections_queued(self) -> bool:
        return are_queued(self.corrected, self.read, self.queued_from)

    @property
    def ready(self) -> bool:
        return self.labelled >= self.least

    @property
    def sentence(self) -> str:
        """What a person wants to know of it."""
        if self.model_version is None:
            return "no study of this model was recorded yet"
        wanted = sum(case.why != "random" for case in self.cases)
        parts = [
            f"{self.labelled} of {wanted} cases to learn from have labels, {self.least} are needed: "
            + ("enough" if self.ready else f"{self.least - self.labelled} more")
        ]
        if (share := self.corrected_share) is not None:
            queued = "are queued for the next training" if self.corrections_queued else "are not queued"
            parts.append(
                f"{self.corrected} of {self.read} that were read were corrected ({share:.0%}; from "
                f"{self.queued_from:.0%} on all corrections are learnt from): they {queued}"
            )
        if self.live_dice is not None:
            parts.append(f"Dice {self.live_dice:.3f} on {self.live_cases} that were drawn by chance and read")
        return "; ".join(parts)


def are_queued(corrected: int, read: int, share: float) -> bool:
    """Whether corrections go into the next training: at least one, and at least this share of what was read."""
    return corrected > 0 and corrected / read >= share


def choose_cases(
    session: Session, learning: ModelLearning, *, now: datetime, canary: CanarySettings | None = None
) -> CaseChoice:
    """Of the model that `learning` is about; nothing is written. `canary` says whose studies are synthetic (default:
    the default AE title). The same rows and `now` give the same choice."""
    version = _serving(session, learning.name)
    said = corrections_of_model(session, learning.name)
    trainings, unfit = _trainings_of(session, learning.name, version), _unfit(session, learning.name)
    learnt = frozenset(
        session.scalars(select(Correction.result_id).where(Correction.learnt_by.in_(trainings)).distinct())
    )
    since = now - timedelta(days=learning.selection.recent_days)
    rows = _recent(session, learning.name, since, now)
    labels = _labels(rows, version)
    corrections = {row.result.result_id: said.get(row.result.result_id) for row in rows}
    canary_ae = (canary or CanarySettings()).ae_title
    reasons = {
        row.result.result_id: _why_left_out(row, corrections[row.result.result_id], labels, canary_ae, learnt, unfit)
        for row in rows
    }
    # Readers judge what failed a hard check, too.
    judged = Counter(
        correction.kind
        for result_id, correction in corrections.items()
        if correction is not None and reasons[result_id] in (None, "rejected", "failed-hard-check")
    )
    read = judged["approved"] + judged["corrected"] + judged["rejected"]
    selection = learning.selection
    is_queued = are_queued(judged["corrected"], read, selection.corrected_share)
    known = _patients_learnt(session, learning.name, trainings)
    left_out: Counter[str] = Counter()
    candidates: list[Candidate] = []
    for row in rows:
        correction, reason = corrections[row.result.result_id], reasons[row.result.result_id]
        is_required = is_queued and correction is not None and correction.kind == "corrected"
        if reason is None or (reason == "failed-hard-check" and is_required):
            candidates.append(_candidate(row, correction, is_required=is_required, known=known))
        else:
            left_out[reason] += 1
    chosen = select_cases(
        candidates,
        most=selection.most,
        random_share=selection.random_share,
        seed=f"{learning.name} {version}",
    )
    by_id = {row.result.result_id: row for row in rows}
    confidence = {candidate.id: candidate.confidence for candidate in candidates}
    cases = tuple(
        _chosen(by_id[choice.id], choice.why, corrections[choice.id], confidence[choice.id]) for choice in chosen
    )
    dices = [
        dice
        for choice in chosen
        if choice.why == "random"
        and by_id[choice.id].result.model_version == version
        and (correction := corrections[choice.id]) is not None
        and (dice := mean_dice(correction.dice)) is not None
    ]
    return CaseChoice(
        model_name=learning.name,
        model_version=version,
        cases=cases,
        candidates=len(candidates),
        left_out=dict(sorted(left_out.items())),
        read=read,
        corrected=judged["corrected"],
        least=selection.least,
        queued_from=selection.corrected_share,
        live_dice=fmean(dices) if dices else None,
        live_cases=len(dices),
    )


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A result with its study and facts."""

    result: Result
    study: Study
    facts: StudyFacts


def _serving(session: Session, name: str) -> str | None:
    """The version that serves: of the open serving period, else of the latest study; None where neither is there."""
    period = session.scalars(
        select(ServingPeriod.model_version)
        .where(ServingPeriod.model_name == name, ServingPeriod.ended_at.is_(None))
        .order_by(ServingPeriod.period_id.desc())
        .limit(1)
    ).first()
    if period is not None:
        return period
    return session.scalars(
        select(StudyFacts.model_version)
        .where(StudyFacts.model_name == name)
        .order_by(StudyFacts.recorded_at.desc(), StudyFacts.result_id)
        .limit(1)
    ).first()


def _recent(session: Session, name: str, since: datetime, now: datetime) -> list[_Row]:
    found = session.execute(
        select(Result, Study, StudyFacts)
        .join(StudyFacts, StudyFacts.result_id == Result.result_id)
        .join(Study, Study.study_instance_uid == Result.study_instance_uid)
        .where(
            StudyFacts.model_name == name,
            StudyFacts.recorded_at >= since,
            StudyFacts.recorded_at <= now,
            Result.state.in_([ResultState.RELEASED, ResultState.HELD]),
        )
        .order_by(StudyFacts.recorded_at, StudyFacts.result_id)
    )
    return [_Row(result=result, study=study, facts=facts) for result, study, facts in found]


def _labels(rows: Sequence[_Row], version: str | None) -> list[tuple[int, str]] | None:
    """Values and names of the labels of the version that serves, as its latest result has them; where it has none yet,
    those of the latest of its major version, which has the same. None where there is none of these."""
    if version is None:
        return None
    major = version.partition(".")[0]
    measured = [row for row in rows if row.result.measurements]
    of_major = [row for row in measured if row.result.model_version.partition(".")[0] == major]
    of_version = [row for row in of_major if row.result.model_version == version]
    return _measured(of_version[-1].result if of_version else of_major[-1].result) if of_major else None


def _measured(result: Result) -> list[tuple[int, str]]:
    return [(int(m["value"]), str(m["name"])) for m in result.measurements or []]


def _why_left_out(
    row: _Row,
    correction: Correction | None,
    labels: list[tuple[int, str]] | None,
    canary_ae: str,
    learnt: frozenset[str],
    unfit: frozenset[str],
) -> str | None:
    result = row.result
    if row.study.calling_ae == canary_ae:
        return "canary"
    if row.study.state == StudyState.QUARANTINED or quarantine.stopped(result.state_reason):
        return "quarantined"
    if result.verdict is None or labels is None or _measured(result) != labels:
        return "other-labels"
    if result.result_id in learnt:
        return "learnt"
    if result.result_id in unfit:
        return "unfit"
    if correction is not None and correction.kind not in USABLE:
        return "rejected" if correction.kind == "rejected" else "opened-and-unread"
    return "failed-hard-check" if _failed_hard(result) else None


def _failed_hard(result: Result) -> bool:
    return any(check["verdict"] == "hold" and check["name"] in HARD_CHECKS for check in result.checks or [])


def _trainings_of(session: Session, name: str, version: str | None) -> frozenset[str]:
    """The trainings that a version descends from. What others learnt, which were refused or rolled back, it has not."""
    made_by = {
        run.semver: run
        for run in session.scalars(
            select(LearningRun).where(LearningRun.model_name == name, LearningRun.semver.is_not(None))
        )
    }
    found: list[str] = []
    while version in made_by and made_by[version].run_id not in found:
        found.append(made_by[version].run_id)
        version = made_by[version].base_version
    return frozenset(found)


def _unfit(session: Session, name: str) -> frozenset[str]:
    """Results of which a training could make no case."""
    chosen = session.scalars(select(LearningRun.cases).where(LearningRun.model_name == name))
    return frozenset(case["result_id"] for cases in chosen for case in cases or () if case.get("left_out"))


def _patients_learnt(session: Session, name: str, trainings: frozenset[str]) -> frozenset[str]:
    """Of whom a case was learnt from by the version that serves, or one before it."""
    found = session.scalars(
        select(Study)
        .join(Result, Result.study_instance_uid == Study.study_instance_uid)
        .join(Correction, Correction.result_id == Result.result_id)
        .where(Correction.model_name == name, Correction.learnt_by.in_(trainings))
        .distinct()
    )
    return frozenset(patient_of(study) for study in found)


def patient_of(study: Study) -> str:
    """Whose study it is, for keeping a person's cases together: PatientID, and without one the study. Capitals, blanks
    and issuers do not part what may be one person. Identifies patients: never written anywhere as it is."""
    folded = "".join((study.patient_id or "").split()).casefold()
    return folded or study.study_instance_uid


def _candidate(row: _Row, correction: Correction | None, *, is_required: bool, known: frozenset[str]) -> Candidate:
    patient = patient_of(row.study)
    return Candidate(
        id=row.result.result_id,
        confidence=confidence_of(row.result.measurements or []),
        at=row.facts.recorded_at,
        scanner=row.facts.scanner,
        patient=patient,
        features=_features(row),
        is_labelled=correction is not None and correction.kind in USABLE,
        is_required=is_required,
        is_known=patient in known,
    )


def confidence_of(measurements: Sequence[Mapping[str, Any]]) -> float | None:
    """1 - the mean over the segments of the entropy in bits in and around each: every label counts the same, however
    large. None where no segment was measured so."""
    known = [float(m["dilated_entropy"]) for m in measurements if m.get("dilated_entropy") is not None]
    return 1.0 - fmean(known) if known else None


def _features(row: _Row) -> dict[str, float]:
    """What the case is like: how it was acquired, its intensities, and how large the segments are."""
    plain = study_row(
        row.facts.acquisition,
        row.facts.image,
        row.result.measurements or [],
        verdict=str(row.result.verdict),
        confidence=None,
    )
    features = {
        name: float(np.log1p(value)) if name.startswith("volume-ml ") else value
        for name, value in plain.numbers.items()
        if not name.startswith(_UNCERTAINTY)
    }
    return features | _of_histograms(plain)


def _of_histograms(row: StudyRow) -> dict[str, float]:
    """Mean and spread of each histogram, in bins."""
    found: dict[str, float] = {}
    for name, shares in row.histograms.items():
        total = sum(shares) if shares is not None else 0.0
        if shares is not None and total > 0:
            weights, bins = np.asarray(shares, dtype=np.float64) / total, np.arange(len(shares))
            mean = float(weights @ bins)
            found[f"{name} mean"] = mean
            found[f"{name} spread"] = float(np.sqrt(weights @ (bins - mean) ** 2))
    return found


def _chosen(row: _Row, why: Why, correction: Correction | None, confidence: float | None) -> ChosenCase:
    return ChosenCase(
        result_id=row.result.result_id,
        study_instance_uid=row.result.study_instance_uid,
        why=why,
        confidence=confidence,
        scanner=row.facts.scanner,
        recorded_at=row.facts.recorded_at,
        verdict=row.result.verdict,
        reading=correction.kind if correction is not None and correction.kind in USABLE else None,
    )
