"""A version in shadow: it runs beside the champion on live studies, and nothing of it leaves (ART-23).

Each result that the champion's model has judged gets a row (ShadowRun) and a place on the queue `shadow`, until as many
studies as the change plan asks for were compared. A run reads the same series, infers, judges by the same QA, compares
with the champion's labels and writes its row: no result, no object, no delivery, no event of the study. It stands back
while results wait for a model, and a failure is said of the version in shadow only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from engine.bundle import Bundle, load_bundle
from engine.metrics import measure_case
from gateway import parking, quarantine
from gateway.device_share import DeviceShare
from gateway.due_work import enqueue_shadow
from gateway.durable import ROUTINE, Enqueuer, next_workflow_id
from gateway.errors import Permanent, Rejected, is_of_the_machine
from gateway.learning_settings import LearningSettings
from gateway.model_shelf import ModelShelf
from gateway.results import contract
from gateway.results.inference import Inferred, infer_part, load_labels
from gateway.results.orders import series_files
from gateway.results.quality import judge, source_doubts
from gateway.results.series import SeriesPart
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.canary_records import CANARY_RULE
from storage.database import Database
from storage.errors import ModelChanged, StorageError
from storage.learning_records import ShadowRun
from storage.models import SHADOW, ModelRegistry, RegisteredModel
from storage.records import Result, ResultState, StudyVersion, utc_now
from storage.spool import Spool

_log = structlog.get_logger(__name__)
FAILED = "shadow-failed"
_CRASHED = "never finished"
_URGENCY = 2 * ROUTINE  # rests while any study is at work
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 600.0


@dataclass(frozen=True, kw_only=True)
class ShadowProgress:
    """How far a version in shadow is. Numbers are of studies; `dice` by label name: mean and lowest to the champion.

    `other_verdicts`: runs that QA judges otherwise than the champion's result, as "pass → hold" with how often.
    """

    wanted: int
    done: int
    pending: int
    failed: int
    skipped: int
    dice: Mapping[str, tuple[float, float]]
    other_verdicts: Mapping[str, int]
    reasons: tuple[str, ...]

    @property
    def is_enough(self) -> bool:
        return self.done >= self.wanted


def shadow_progress(session: Session, name: str, semver: str, *, wanted: int) -> ShadowProgress:
    """Of all runs of a version, whenever they were."""
    rows = session.execute(
        select(ShadowRun, Result.study_instance_uid)
        .join(Result, Result.result_id == ShadowRun.result_id)
        .where(ShadowRun.model_name == name, ShadowRun.model_version == semver)
        .order_by(ShadowRun.shadow_id)
    ).all()
    studies: dict[str, set[str]] = {state: set() for state in ("done", "pending", "failed", "skipped")}
    dice: dict[str, list[float]] = {}
    verdicts: Counter[str] = Counter()
    for run, study in rows:
        studies[run.state].add(study)
        for label, value in (run.dice or {}).items():
            if value is not None:
                dice.setdefault(label, []).append(value)
        champion = (run.figures or {}).get("champion", {}).get("verdict")
        if run.state == "done" and run.verdict != champion:
            verdicts[f"{champion} → {run.verdict}"] += 1
    return ShadowProgress(
        wanted=wanted,
        done=len(studies["done"]),
        pending=len(studies["pending"]),
        failed=len(studies["failed"]),
        skipped=len(studies["skipped"]),
        dice={label: (fmean(values), min(values)) for label, values in dice.items()},
        other_verdicts=dict(verdicts),
        reasons=tuple(dict.fromkeys(run.state_reason or "" for run, _ in rows if run.state == "failed")),
    )


def start_shadow(
    database: Database, registry: ModelRegistry, learning: LearningSettings, name: str, semver: str, *, actor: str
) -> RegisteredModel:
    """From now on a registered version runs in shadow, instead of another one; repeated, it changes nothing.

    Raises ModelMissing; Rejected for the version that serves, and where the change plan asks for no studies in shadow;
    BundleInvalid or ModelChanged for files that are not those that were registered.
    """
    model, champion = registry.get(name, semver), registry.champion(name)
    if champion.semver == semver:
        raise Rejected(f"{name} {semver} serves already; in shadow runs another version beside it")
    studies = learning.of(name).change_plan.shadow_studies
    if not studies:
        raise Rejected(f"the change plan of {name} asks for no studies in shadow; set shadow_studies in learning.toml")
    if SHADOW in model.aliases:
        return model
    digests = (model.weights_digest, model.configuration_digest)
    bundle = load_bundle(model.folder, verify=True)
    if (bundle.weights_digest, bundle.configuration_digest) != digests:
        raise ModelChanged(f"{name} {semver}: its files are not those that were registered; import the model again")
    detail = {"semver": semver, "weights_digest": model.weights_digest, "champion": champion.semver, "studies": studies}
    with database.session() as session:  # first what is meant, then the alias: after a crash in between say it again
        ledger.append(session, subject=ledger.model_subject(name), kind="shadow-started", actor=actor, detail=detail)
    return registry.set_shadow(name, semver)


def stop_shadow(database: Database, registry: ModelRegistry, name: str, *, actor: str) -> str | None:
    """No version of a model runs in shadow any more; which one did, None where none. Runs that wait are skipped."""
    model = next((m for m in registry.versions(name) if SHADOW in m.aliases), None)
    if model is None:
        return None
    with database.session() as session:
        detail = {"semver": model.semver}
        ledger.append(session, subject=ledger.model_subject(name), kind="shadow-stopped", actor=actor, detail=detail)
        clear_alarms(session, kind=FAILED, subject=_subject(name, model.semver), by=actor)
    registry.clear_shadow(name)
    return model.semver


class Shadows:
    """Orders runs beside judged results, and does the steps of `shadow_result`.

    `busy` and `idle` announce the work to the supervisor, as for a result: a run that is stuck is ended. `finished` is
    told the model's name after each run: its version in shadow may have been seen often enough.
    """

    def __init__(
        self,
        *,
        database: Database,
        spool: Spool,
        shelf: ModelShelf,
        enqueuer: Enqueuer,
        learning: LearningSettings,
        attempts: int,
        share: DeviceShare,
        disabled_checks: Collection[str],
        busy: Callable[[str], None],
        idle: Callable[[str], None],
        finished: Callable[[str], object] = lambda _name: None,
    ) -> None:
        self._database = database
        self._spool = spool
        self._shelf = shelf
        self._enqueuer = enqueuer
        self._finished = finished
        self._learning = learning
        self._attempts = attempts
        self._share = share
        self._disabled_checks = disabled_checks
        self._busy = busy
        self._idle = idle

    def order(self, result_id: str) -> None:
        """After a result was judged: a run beside it, where its model has a version in shadow. What fails is logged."""
        try:
            self._order(result_id)
        except (StorageError, IntegrityError) as error:
            _log.warning("a shadow run could not be ordered", result_id=result_id, error=type(error).__name__)

    def _order(self, result_id: str) -> None:
        with self._database.reading() as session:
            result = session.get_one(Result, result_id)
        if result.rule == CANARY_RULE:
            return
        wanted = self._learning.of(result.model_name).change_plan.shadow_studies
        shadow = self._shelf.shadow(result.model_name) if wanted and result.state == ResultState.PENDING else None
        if shadow is None or shadow.semver == result.model_version:
            return
        with self._database.session() as session:
            if not _is_wanted(session, result, shadow.semver, wanted):
                return
            run = ShadowRun(
                result_id=result_id,
                model_name=shadow.name,
                model_version=shadow.semver,
                workflow_id=f"shadow-{result_id}-{shadow.semver}",
                ordered_at=utc_now(),
                attempts=0,
                state="pending",
            )
            session.add(run)
            session.flush()
            enqueue_shadow(session, self._enqueuer, run)

    def compare(self, shadow_id: str, turn: str) -> str:
        """ "done"; "skipped" where the comparison has lost its sense; "waits" when it stood back for results that wait
        for a model, and comes again as another turn. Raises what a run fails with."""
        with self._database.reading() as session:
            known = session.get_one(ShadowRun, int(shadow_id))
        outcome = self._compare(known, turn)
        if outcome == "done":  # also by an earlier run of this step, which may have died before it told
            self._finished(known.model_name)
        return outcome

    def _compare(self, known: ShadowRun, turn: str) -> str:
        shadow = self._shelf.shadow(known.model_name)
        stopped = shadow is None or shadow.semver != known.model_version
        with self._database.session() as session:
            run = session.get_one(ShadowRun, known.shadow_id, with_for_update=True)
            if run.workflow_id != turn or run.state != "pending":
                return run.state
            result = session.get_one(Result, run.result_id)
            reason = _why_not(session, result, stopped=stopped)
            if reason is not None:
                run.state, run.state_reason, run.finished_at = "skipped", reason, utc_now()
                return "skipped"
            if _results_wait(session):
                delay_s = min(_FIRST_WAIT_S * 2.0 ** min(_turns(turn), 10), _LONGEST_WAIT_S)
                run.workflow_id = next_workflow_id(turn)
                enqueue_shadow(session, self._enqueuer, run, delay_s=delay_s)
                return "waits"
            # Counted before the work, as for a result: what kills its worker does not do so for ever.
            run.attempts += 1
            attempt = run.attempts
            version = session.get_one(StudyVersion, result.version_id)
            files = series_files(session, self._spool, version, result)
        if attempt > self._attempts:
            raise Permanent(f"it was begun {self._attempts} times and {_CRASHED}; see the worker's log")
        name = _work_name(known)
        self._busy(name)
        try:
            return self._run(run, result, version, files)
        except StorageError as error:
            if is_of_the_machine(error):  # waited for however long, so such a beginning does not count
                with self._database.session() as session:
                    session.get_one(ShadowRun, run.shadow_id).attempts -= 1
            raise
        finally:
            self._idle(name)

    def park_shadow(self, shadow_id: str, step: str, reason: str) -> str:
        """The run has failed, with an alarm for the version in shadow; the study is not touched."""
        with self._database.session() as session:
            run = session.get(ShadowRun, int(shadow_id), with_for_update=True)
            if run is None:
                return parking.DELETED
            if run.state != "pending":
                return run.state
            run.state, run.state_reason, run.finished_at = "failed", f"{step}: {reason}", utc_now()
            subject = _subject(run.model_name, run.model_version)
            raise_alarm(session, kind=FAILED, subject=subject, message=f"in shadow: {run.state_reason}")
        return "failed"

    def _run(self, run: ShadowRun, result: Result, version: StudyVersion, files: tuple[Path, ...]) -> str:
        model = self._shelf.version(run.model_name, run.model_version)
        champion = self._shelf.bundle(self._shelf.version(result.model_name, result.model_version))
        bundle = self._shelf.bundle(model)

        def refuse(part: SeriesPart) -> None:
            refusal = contract.first_refusal(contract.judge(part, bundle.contract, channels=len(bundle.channels)))
            if refusal is not None:
                raise Rejected(f"the version in shadow may not run on this series: {refusal.name}: {refusal.detail}")

        name = _work_name(run)
        inferred = infer_part(
            self._shelf,
            model,
            files,
            result.part,
            admitted=lambda needed: self._share.admitted(
                _URGENCY, needed, rests=lambda: self._idle(name), goes_on=lambda: self._busy(name)
            ),
            before_pixels=refuse,
        )
        measurements, runtime = inferred.measurements(), inferred.runtime()
        verdict, checks = judge(
            measurements,
            mean_confidence=runtime["mean_confidence"],
            bundle=bundle,
            doubts=source_doubts(
                version.rule,
                version.evidence,
                series_instance_uid=result.series_instance_uid,
                missing_slices=runtime["missing_slices"],
            ),
            disabled=self._disabled_checks,
        )
        dice = label_dice(load_labels(self._spool, result), champion, inferred)
        figures = {
            "champion": _figures(result.model_version, result.verdict, result.measurements or [], result.runtime or {}),
            "shadow": _figures(run.model_version, str(verdict), measurements, runtime),
            "checks": [check.to_json() for check in checks if check.verdict != "pass"],
        }
        with self._database.session() as session:
            row = session.get_one(ShadowRun, run.shadow_id, with_for_update=True)
            if row.state == "pending":
                row.state, row.finished_at, row.verdict = "done", utc_now(), str(verdict)
                row.dice, row.figures = dice, figures
        return "done"


def _work_name(run: ShadowRun) -> str:
    return f"shadow {run.shadow_id}"


def label_dice(labels: NDArray[Any], champion: Bundle, inferred: Inferred) -> dict[str, float | None]:
    """By the name of each label that both versions have: Dice of the shadow's labels to the champion's, (Z, Y, X) of
    one grid; None where neither found it. A name may stand for another value in either version."""
    mine = {spec.name: spec.region for spec in inferred.bundle.labels}
    pairs = {spec.name: (spec.region, mine[spec.name]) for spec in champion.labels if spec.name in mine}
    other = inferred.prediction.labels.array
    found: dict[str, float | None] = {}
    alike = {name: here for name, (here, there) in pairs.items() if here == there}
    if alike:
        metrics = measure_case(labels, other, (1.0, 1.0, 1.0), list(alike.values()), surfaces=False)
        found = {name: metrics[region].dice for name, region in alike.items()}
    for name in pairs.keys() - alike.keys():
        here, there = np.isin(labels, pairs[name][0]), np.isin(other, pairs[name][1])
        total = int(here.sum()) + int(there.sum())
        found[name] = 2 * int((here & there).sum()) / total if total else None
    return {name: found[name] for name in pairs}


def _is_wanted(session: Session, result: Result, semver: str, wanted: int) -> bool:
    """Whether a result still gets a run: of a study that has one, or while studies are missing. A version that failed
    in as many as were wanted, or that ended its worker, gets no more."""
    rows = session.execute(
        select(ShadowRun.result_id, ShadowRun.state, ShadowRun.state_reason, Result.study_instance_uid)
        .join(Result, Result.result_id == ShadowRun.result_id)
        .where(ShadowRun.model_name == result.model_name, ShadowRun.model_version == semver)
    ).all()
    failed = [row for row in rows if row.state == "failed"]
    if any(row.result_id == result.result_id for row in rows):
        return False
    if len(failed) >= wanted or any(_CRASHED in (row.state_reason or "") for row in failed):
        return False
    studies = {row.study_instance_uid for row in rows if row.state in ("done", "pending")}
    return result.study_instance_uid in studies or len(studies) < wanted


def _subject(name: str, semver: str) -> str:
    return f"{ledger.model_subject(name)} {semver}"


def _why_not(session: Session, result: Result, *, stopped: bool) -> str | None:
    if stopped:
        return "the version no longer runs in shadow"
    if result.state == ResultState.SUPERSEDED:
        return "the champion's result was superseded before the shadow ran"
    return quarantine.reason_to_stop(session, result.study_instance_uid)


def _results_wait(session: Session) -> bool:
    """Whether a result is to be made whose model has not run yet, of whichever model: they share the machine."""
    waiting = select(Result.result_id).where(Result.state == ResultState.PENDING, Result.verdict.is_(None)).limit(1)
    return session.scalars(waiting).first() is not None


def _turns(workflow_id: str) -> int:
    _, _, count = workflow_id.rpartition("~")
    return int(count) if count.isdigit() else 0


def _figures(
    version: str, verdict: str | None, measurements: Collection[Mapping[str, Any]], runtime: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "version": version,
        "verdict": verdict,
        "volumes_ml": {m["name"]: m["volume_ml"] for m in measurements},
        "confidence": runtime.get("mean_confidence"),
        "seconds": round(sum(runtime.get("seconds", {}).values()), 4),
    }
