"""The canary (OPS-59): a synthetic study of each model that serves goes the real way, and what comes is compared.

    start: a sanity case of the champion's bundle as a new study ─C-STORE▶ our own receiver ▸ … ▸ released to nobody
    check: a result in time, SEG and SR in the spool, each label as the bundle says it

A run that is wrong is the alarm `canary` of its model until a later one is good. One run of a model is under way at a
time. The check comes when the result is released, when it is overdue, and with the next start; while no worker is
there to make it, the scheduler tells that canaries are late (gateway/monitoring/canary_watch.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.bundle import Bundle
from engine.errors import BundleInvalid
from engine.sanity_cases import LoadedSanityCase, SanityCase, load_case
from engine.sanity_check import STRICT, reference_figures
from engine.volume import Geometry, LabelMap
from gateway.due_work import enqueue_canary_check
from gateway.durable import Enqueuer
from gateway.errors import Rejected
from gateway.intake.admission import own_address
from gateway.learning.pauses import is_paused
from gateway.model_shelf import ModelShelf
from gateway.monitoring import canary_watch
from gateway.monitoring.canary_removal import remove_old
from gateway.monitoring.canary_series import modality_of, new_uid, slice_axes, write_canary_series
from gateway.results.contract import first_refusal, judge
from gateway.results.series import read_series
from gateway.sending import PeerRefused, send_files
from gateway.setting_types import PeerAddress
from gateway.settings import Settings
from storage.canary_records import CANARY_RULE, CanaryRun
from storage.database import Database
from storage.errors import ModelChanged, ModelMissing, ObjectChanged, ObjectMissing
from storage.models import CHAMPION, ModelRegistry, RegisteredModel
from storage.records import Result, ResultObject, ResultState, utc_now
from storage.spool import Spool

_ROLES = ("SEG", "SR")
_SEND_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Started:
    """One model: the study that is on its way, or why there is none."""

    model: str
    study_instance_uid: str | None
    reason: str


class Canary:
    """Starts canaries, and compares what came of them."""

    def __init__(
        self,
        *,
        database: Database,
        spool: Spool,
        settings: Settings,
        registry: ModelRegistry,
        shelf: ModelShelf,
        enqueuer: Enqueuer,
    ) -> None:
        self._database = database
        self._spool = spool
        self._settings = settings
        self._registry = registry
        self._shelf = shelf
        self._enqueuer = enqueuer

    def run(self) -> str:
        """The job: compare what is due, remove what is old, start a study of each model; a sentence on it."""
        compared = self.check()
        removed = remove_old(self._database, self._spool, keep_days=self._settings.gateway.canary.keep_days)
        started = [self.start(model) for model in self.champions()]
        under_way = [one.model for one in started if one.study_instance_uid is not None]
        left = [f"{one.model}: {one.reason}" for one in started if one.study_instance_uid is None]
        said = f"{compared}; {removed} old ones removed; started: {', '.join(under_way) or 'none'}"
        return f"{said}; not started: {'; '.join(left)}" if left else said

    def check(self) -> str:
        """Compare every run whose result is there, or overdue; a sentence on it."""
        with self._database.reading() as session:
            open_runs = session.scalars(select(CanaryRun).where(CanaryRun.judged_at.is_(None))).all()
        outcomes = [outcome for run in open_runs if (outcome := self.judge(run.study_instance_uid)) is not None]
        return f"{len(outcomes)} compared, {sum(outcome != 'good' for outcome in outcomes)} of them not good"

    def champions(self) -> list[RegisteredModel]:
        """The versions that serve, by name."""
        return [model for model in self._registry.all() if CHAMPION in model.aliases]

    # -- starting ----------------------------------------------------------------------------------------------

    def start(self, model: RegisteredModel) -> Started:
        """Send a canary of a version that serves; what keeps it from being sent is the reason, and where the gateway
        itself is at fault, an alarm."""
        name = f"{model.name} {model.semver}"
        with self._database.reading() as session:
            if is_paused(session, model.name):
                return Started(model=name, study_instance_uid=None, reason="the model is paused")
            under_way = session.scalars(
                select(CanaryRun).where(CanaryRun.model_name == model.name, CanaryRun.judged_at.is_(None)).limit(1)
            ).first()
        if under_way is not None:
            return Started(model=name, study_instance_uid=None, reason="one of it is under way")
        try:
            bundle = self._shelf.bundle(model)
            with tempfile.TemporaryDirectory(prefix="seggate-canary-") as scratch:
                written = self._write(Path(scratch), model, bundle)
                if isinstance(written, str):
                    return Started(model=name, study_instance_uid=None, reason=written)
                case, study_instance_uid, files = written
                self._note(model, case, study_instance_uid)
                fault = self._send(files)
        except (BundleInvalid, ModelChanged, ModelMissing) as error:
            with self._database.session() as session:
                canary_watch.tell(session, model.name, f"its bundle cannot be used: {error}")
            return Started(model=name, study_instance_uid=None, reason=str(error))
        if fault is not None:
            with self._database.session() as session:
                run = session.get_one(CanaryRun, study_instance_uid)
                canary_watch.record(session, run, outcome="wrong", detail=f"it could not be sent: {fault}")
            return Started(model=name, study_instance_uid=None, reason=fault)
        with self._database.session() as session:
            session.get_one(CanaryRun, study_instance_uid).sent_at = utc_now()
        return Started(model=name, study_instance_uid=study_instance_uid, reason=f"sanity case {case.name}")

    def _write(
        self, folder: Path, model: RegisteredModel, bundle: Bundle
    ) -> tuple[SanityCase, str, tuple[Path, ...]] | str:
        """A series of a sanity case that the model's own contract lets pass, or why there is none."""
        if len(bundle.channels) != 1:
            return f"the model wants {len(bundle.channels)} channels; one series gives 1"
        cases = sorted(bundle.evidence.sanity.cases if bundle.evidence.sanity else (), key=_preference)
        if not cases:
            return "its bundle has no sanity case"
        try:
            modality = modality_of(bundle.contract.modalities)
        except Rejected as error:
            return str(error)
        why = ""
        for case in cases:
            loaded = _loaded(bundle, case)
            for axis in slice_axes(loaded.volume, bundle.contract):
                target = folder / f"{case.name}-{axis}"
                series = write_canary_series(
                    target,
                    loaded.volume,
                    study_instance_uid=new_uid(),
                    modality=modality,
                    slice_axis=axis,
                    model=model.name,
                )
                parts = read_series(series.files, only_headers=True)
                refusal = first_refusal(judge(parts[0], bundle.contract, channels=1))
                if len(parts) == 1 and refusal is None:
                    return case, series.study_instance_uid, series.files
                why = f"{case.name}: {refusal.detail if refusal else 'more than one volume'}"
        return f"its contract takes none of its sanity cases ({why})"

    def _note(self, model: RegisteredModel, case: SanityCase, study_instance_uid: str) -> None:
        """Before it is sent: from then on the study is known as a canary."""
        own, now = self._settings.gateway, utc_now()
        within_s = own.canary.result_within_s
        with self._database.session() as session:
            session.add(
                CanaryRun(
                    study_instance_uid=study_instance_uid,
                    model_name=model.name,
                    model_version=model.semver,
                    case_name=case.name,
                    calling_ae=own.canary.ae_title,
                    address=own_address(own.receiver.host),
                    started_at=now,
                    due_at=now + timedelta(seconds=within_s),
                )
            )
            enqueue_canary_check(session, self._enqueuer, study_instance_uid, why="due", delay_s=within_s + 1)

    def _send(self, files: Sequence[Path]) -> str | None:
        """None when everything was stored, else what was wrong."""
        own = self._settings.gateway
        peer = PeerAddress(ae_title=own.receiver.ae_title, host=own_address(own.receiver.host), port=own.receiver.port)
        try:
            report = send_files(list(files), peer, calling_ae=own.canary.ae_title, timeout_s=_SEND_TIMEOUT_S)
        except PeerRefused as error:
            return f"{error}. The receiver takes canaries from its own host, while scheduler.canary_cron is set"
        return None if report.is_complete else report.failed[0].reason

    # -- comparing ---------------------------------------------------------------------------------------------

    def judge(self, study_instance_uid: str) -> str | None:
        """ "good", "wrong" or "void" (it says nothing about the model); None while a result may still come in time."""
        with self._database.reading() as session:
            run = session.get_one(CanaryRun, study_instance_uid)
            if run.outcome is not None:
                return run.outcome
            result = _result_of(session, run)
            objects = session.scalars(
                select(ResultObject).where(ResultObject.result_id == (result.result_id if result else ""))
            ).all()
            late = canary_watch.overdue(session, run, utc_now())
            paused = is_paused(session, run.model_name)
        if result is not None and result.state == ResultState.HELD and paused:
            return self._record(run, "void", "the model was paused meanwhile")
        if result is None or result.state in (ResultState.PENDING, ResultState.HELD):
            return None if late is None else self._record(run, *late)
        if result.state != ResultState.RELEASED:
            return self._record(run, "wrong", f"its result is {result.state}: {result.state_reason}")
        if result.model_version != run.model_version:
            why = f"{run.model_name} {result.model_version} was made the one that serves meanwhile"
            return self._record(run, "void", why)
        seconds = (result.finished_at - run.started_at).total_seconds() if result.finished_at else None
        faults = [fault for role in _ROLES if (fault := self._missing(objects, role)) is not None]
        if seconds is not None and run.started_at + timedelta(seconds=seconds) > run.due_at:
            faults.insert(0, f"slow: {seconds:.0f} s, at most {(run.due_at - run.started_at).total_seconds():.0f} s")
        try:
            dice, wrong = self._compare(run, result)
        except (ObjectMissing, ObjectChanged, BundleInvalid, ModelChanged, ModelMissing, Rejected) as error:
            dice, wrong = {}, [f"its labels cannot be compared: {error}"]
        faults += wrong
        return self._record(run, "wrong" if faults else "good", "; ".join(faults) or None, seconds=seconds, dice=dice)

    def _missing(self, objects: Sequence[ResultObject], role: str) -> str | None:
        found = next((item for item in objects if item.role == role), None)
        if found is None:
            return f"there is no {role}"
        try:
            self._spool.unchanged(found.spool_path, found.digest)
        except (ObjectMissing, ObjectChanged) as error:
            return f"{role}: {error}"
        return None

    def _compare(self, run: CanaryRun, result: Result) -> tuple[dict[str, float | None], list[str]]:
        """Dice of each label against those of the bundle, and what is below the limit."""
        bundle = self._shelf.bundle(self._shelf.version(run.model_name, run.model_version))
        suite = bundle.evidence.sanity
        case = next((case for case in suite.cases if case.name == run.case_name), None) if suite else None
        if case is None:
            raise BundleInvalid(f"{run.model_name} {run.model_version}: the sanity case {run.case_name} is gone")
        labels = result_labels(self._spool, result)
        expected = _loaded(bundle, case).labels.reoriented(labels.geometry.orientation)[0]
        if not expected.geometry.same_grid(labels.geometry, tolerance_mm=1e-2):
            raise Rejected("they lie on another grid than the sanity case")
        dice = reference_figures(expected.array, labels.array, bundle.labels)
        least = self._settings.gateway.canary.min_dice
        wrong = []
        for spec in bundle.labels:
            value = dice[spec.name]
            differing = np.isin(expected.array, spec.region) != np.isin(labels.array, spec.region)
            if value is not None and value < least and int(differing.sum()) > STRICT.voxels:
                wrong.append(f"{spec.name}: Dice {value:.3f} to what the bundle says, at least {least:g}")
        return dice, wrong

    def _record(
        self,
        run: CanaryRun,
        outcome: str,
        detail: str | None,
        *,
        seconds: float | None = None,
        dice: Mapping[str, float | None] | None = None,
    ) -> str:
        with self._database.session() as session:
            current = session.get_one(CanaryRun, run.study_instance_uid, with_for_update=True)
            return canary_watch.record(session, current, outcome=outcome, detail=detail, seconds=seconds, dice=dice)


def result_labels(spool: Spool, result: Result) -> LabelMap:
    """The labels of a result on their grid, as they were written. Raises ObjectMissing, ObjectChanged."""
    file = (result.runtime or {}).get("labels")
    if file is None:
        raise ObjectMissing(f"result {result.result_id} has no labels")
    with np.load(spool.unchanged(file["path"], file["sha256"]), allow_pickle=False) as archive:
        array, affine = archive["labels"], archive["affine_lps"]
    return LabelMap(array=array, geometry=Geometry(shape=array.shape, affine_lps=affine))


def _result_of(session: Session, run: CanaryRun) -> Result | None:
    return session.scalars(
        select(Result)
        .where(Result.study_instance_uid == run.study_instance_uid, Result.rule == CANARY_RULE)
        .order_by(Result.created_at.desc())
        .limit(1)
    ).first()


def _loaded(bundle: Bundle, case: SanityCase) -> LoadedSanityCase:
    highest = bundle.label_manager.highest_value
    return load_case(bundle.root, case, channels=len(bundle.channels), highest=highest)


def _preference(case: SanityCase) -> tuple[int, int, int]:
    """Every label in it, then a case of the site, then the smallest."""
    shape = case.phantom.shape if case.phantom is not None else case.geometry.shape if case.geometry else (0, 0, 0)
    absent = sum(count == 0 for count in case.voxels.values())
    return absent, int(case.phantom is not None), int(np.prod(shape))
