"""From routing decisions to results to be made: one per series part and model, with the model's identity fixed.

A part of a series (CMP-20) that the model's contract excludes becomes a result `not_run` with the reason, so that
"no result" can be told from "not arrived" and "failed" (INF-37).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.bundle import Bundle
from engine.errors import BundleInvalid
from gateway import quarantine, study_state, superseding
from gateway.due_work import enqueue_result
from gateway.durable import ROUTINE, URGENT, Enqueuer
from gateway.errors import Rejected, Transient, meaning
from gateway.learning import pauses
from gateway.learning.serving import open_period, overtaken
from gateway.model_shelf import ModelShelf
from gateway.results.contract import ContractFinding, judge
from gateway.results.series import read_series
from gateway.routed_work import routed, urgent_work, work_of
from storage import ledger
from storage.alarms import raise_alarm
from storage.database import Database
from storage.deletion_records import times_deleted
from storage.errors import ModelChanged, ModelMissing
from storage.models import RegisteredModel
from storage.records import (
    Instance,
    InstanceState,
    Result,
    ResultState,
    RoutingDecision,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)
from storage.spool import Spool, study_key


class Orders:
    """Step `order` of the story.

    `unusable(model, why)` is told of a champion whose bundle cannot be loaded; true when another version serves since.
    """

    def __init__(
        self,
        *,
        database: Database,
        spool: Spool,
        shelf: ModelShelf,
        enqueuer: Enqueuer,
        unusable: Callable[[RegisteredModel, str], bool] = lambda _model, _why: False,
    ) -> None:
        self._database = database
        self._spool = spool
        self._shelf = shelf
        self._enqueuer = enqueuer
        self._unusable = unusable

    def order(self, version_id: str) -> str:
        """Write a Result row per matched series part and enqueue what is to run; "ordered" or "nothing-to-run".

        Repeated, it adds what is missing. A model that cannot be had stops no other: it has a FAILED row. Raises
        Transient where another version was promoted, or this one rolled back, while it was being planned with.
        """
        with self._database.reading() as session:
            version = session.get_one(StudyVersion, version_id)
            known = _ordered(session, version_id)
            wanted = [(d, urgent) for d, urgent in _wanted(session, version_id) if work_of(d) not in known]
            files = {d.series_instance_uid: series_files(session, self._spool, version, d) for d, _ in wanted}
            content = content_key(session, version)
        planned = [
            (result, urgent, refusals)
            for decision, urgent in wanted
            for result, refusals in self._plan(version, content, decision, files[decision.series_instance_uid])
        ]
        with self._database.session() as session:
            _refuse_overtaken(session, [result for result, _, _ in planned])
            # Another run of the same step may have been faster.
            known = _ordered(session, version_id)
            added = [(r, u) for r, u, _ in planned if work_of(r) not in known]
            refused = {r.result_id: refusals for r, _, refusals in planned if refusals}
            place(session, self._enqueuer, version, added, refused)
            superseding.no_longer_wanted(session, version)
            study = session.get_one(Study, version.study_instance_uid)
            if study.version == version.number and study.state == StudyState.PROCESSING:
                study_state.refresh(session, study.study_instance_uid)
        return "ordered" if known or any(r.state == ResultState.PENDING for r, _ in added) else "nothing-to-run"

    def _plan(
        self, version: StudyVersion, content: str, decision: RoutingDecision, files: Sequence[Path]
    ) -> list[tuple[Result, list[ContractFinding]]]:
        """Per part of the series the row, and what the contract says against it."""
        try:
            model, bundle = self._usable(str(decision.model))
        except (ModelMissing, ModelChanged, BundleInvalid) as error:
            reason = f"order: {meaning(error).__name__}: {error}"
            return [(_planned(version, content, decision, None, state=ResultState.FAILED, reason=reason), [])]
        return plan_series(version, content, decision, files, model, bundle)

    def _usable(self, name: str) -> tuple[RegisteredModel, Bundle]:
        model = self._serving(name)
        try:
            return model, self._shelf.bundle(model)
        except (ModelChanged, BundleInvalid) as error:
            if not self._unusable(model, str(error)):
                raise
        model = self._serving(name)  # another version, since
        return model, self._shelf.bundle(model)

    def _serving(self, name: str) -> RegisteredModel:
        """The champion. The shelf looks every two seconds, and the alias follows: until then our serving period says
        which one it is, so that nothing is ordered from a version that was withdrawn."""
        model = self._shelf.champion(name)
        with self._database.reading() as session:
            period = open_period(session, name)
        if period is None or period.model_version == model.semver:
            return model
        return self._shelf.version(name, period.model_version)


def plan_series(
    version: StudyVersion,
    content: str,
    series: RoutingDecision | Result,
    files: Sequence[Path],
    model: RegisteredModel,
    bundle: Bundle,
) -> list[tuple[Result, list[ContractFinding]]]:
    """Per part of a series the row of one version of a model, and what its contract says against it.

    `content`: see `content_key`. The row of a series that cannot be read is NOT_RUN. Raises OSError for a missing file.
    """
    try:
        parts = read_series(files, only_headers=True)
    except Rejected as error:
        return [(_planned(version, content, series, model, state=ResultState.NOT_RUN, reason=str(error)), [])]
    planned = []
    for part in parts:
        failed = [f for f in judge(part, bundle.contract, channels=len(bundle.channels)) if not f.ok]
        reason = "; ".join(f"{f.name}: {f.detail}" for f in failed)
        state = ResultState.NOT_RUN if failed else ResultState.PENDING
        result = _planned(version, content, series, model, part=part.part, state=state, reason=reason or None)
        planned.append((result, failed))
    return planned


def planned_failure(
    version: StudyVersion, content: str, series: Result, model: RegisteredModel, *, reason: str
) -> Result:
    """The row of a part that nothing could be planned for; `seggate retry` tries it again."""
    return _planned(version, content, series, model, part=series.part, state=ResultState.FAILED, reason=reason)


def place(
    session: Session,
    enqueuer: Enqueuer,
    version: StudyVersion,
    added: Sequence[tuple[Result, bool]],
    refused: Mapping[str, Sequence[ContractFinding]],
    **detail: Any,
) -> None:
    """Rows with whether they are urgent, what they replace, their queue entries and the ledger event with `detail`.

    refused: by result_id.
    """
    if not added:
        return
    stop = quarantine.reason_to_stop(session, version.study_instance_uid)
    for result, _ in added:
        parts = {r.part for r, _ in added if work_of(r) == work_of(result)}
        result.supersedes = superseding.predecessor(session, version, result, parts)
    session.add_all([result for result, _ in added])
    session.flush()
    for result, urgent in added:
        if result.state == ResultState.NOT_RUN:
            superseding.replaced_by_none(session, result)
        elif result.state == ResultState.FAILED:
            _alarm_failed(session, result)
        elif stop is not None:
            quarantine.hold_result(session, result, stop)
        elif (wait := pauses.reason_to_wait(session, result.model_name)) is not None:
            pauses.hold_result(session, result, wait)
        else:
            enqueue_result(session, enqueuer, result, priority=URGENT if urgent else ROUTINE)
    ledger.append(
        session,
        subject=ledger.study_subject(version.study_instance_uid),
        kind="ordered",
        actor="worker",
        detail={
            **detail,
            "version": version.number,
            "results": [
                {
                    "result_id": r.result_id,
                    "series": r.series_instance_uid,
                    "part": r.part,
                    "model": f"{r.model_name} {r.model_version}".strip(),
                    "weights_digest": r.weights_digest,
                    "state": r.state,
                    "reason": r.state_reason,
                    "refused": [
                        {"criterion": f.name, "value": f.value, "limit": f.limit} for f in refused.get(r.result_id, ())
                    ],
                }
                for r, _ in added
            ],
        },
    )


def _planned(
    version: StudyVersion,
    content: str,
    series: RoutingDecision | Result,
    model: RegisteredModel | None,
    *,
    part: str = "",
    state: ResultState,
    reason: str | None,
) -> Result:
    identity = (
        (work_of(series)[1], "", "", "")
        if model is None
        else (model.name, model.semver, model.weights_digest, model.configuration_digest)
    )
    result_id = _result_id(version, content, series.series_instance_uid, part, identity)
    return Result(
        result_id=result_id,
        version_id=version.version_id,
        study_instance_uid=version.study_instance_uid,
        series_instance_uid=series.series_instance_uid,
        part=part,
        rule=series.rule,
        model_name=identity[0],
        model_version=identity[1],
        weights_digest=identity[2],
        configuration_digest=identity[3],
        state=state,
        state_reason=reason,
        workflow_id=f"result-{result_id}",
        created_at=utc_now(),
        finished_at=None if state == ResultState.PENDING else utc_now(),
        attempts=0,
    )


def _ordered(session: Session, version_id: str) -> set[tuple[str, str]]:
    return {work_of(r) for r in session.scalars(select(Result).where(Result.version_id == version_id))}


def _wanted(session: Session, version_id: str) -> list[tuple[RoutingDecision, bool]]:
    """One decision per series and model, and whether it is urgent.

    Several rules may send the same series to the same model: one result, under the first rule, urgent if any says so.
    """
    decisions = routed(session, version_id)
    urgent = urgent_work(decisions)
    first: dict[tuple[str, str], RoutingDecision] = {}
    for decision in decisions:
        if decision.matched:
            first.setdefault(work_of(decision), decision)
    return [(decision, work in urgent) for work, decision in first.items()]


def _refuse_overtaken(session: Session, planned: Sequence[Result]) -> None:
    """What is ordered is of the version that serves to the end of the transaction, or Transient is raised."""
    for name, semver in {(r.model_name, r.model_version) for r in planned if r.model_version}:
        if overtaken(session, name, semver):
            raise Transient(f"{name} {semver} was being ordered when another version was to serve; it is planned again")


def _alarm_failed(session: Session, result: Result) -> None:
    subject = ledger.study_subject(result.study_instance_uid)
    message = f"{result.model_name}: {result.state_reason}"
    raise_alarm(session, kind="parked", subject=subject, message=message)


def series_files(
    session: Session, spool: Spool, version: StudyVersion, series: RoutingDecision | Result
) -> tuple[Path, ...]:
    """The files of one series as they were when the version was declared whole."""
    rows = session.scalars(
        select(Instance).where(
            Instance.study_instance_uid == version.study_instance_uid,
            Instance.series_instance_uid == series.series_instance_uid,
            Instance.state.in_([InstanceState.CURRENT, InstanceState.REPLACED]),
        )
    ).all()
    wanted = set(version.object_ids)
    return tuple(spool.resolve(r.spool_path) for r in sorted(rows, key=lambda r: r.object_id) if r.object_id in wanted)


def content_key(session: Session, version: StudyVersion) -> str:
    """What a result was made from. Content that comes back (A, B, A again) is another result with other UIDs.

    The first version with a content has the content's own digest, so that the same work has the same identity
    wherever it is done; a later one is told apart by its number, one of a study that was deleted and sent again by how
    often that was: what was made before may still be in a PACS, and has other bytes.
    """
    earlier = session.scalars(
        select(StudyVersion.number)
        .where(
            StudyVersion.study_instance_uid == version.study_instance_uid,
            StudyVersion.content_digest == version.content_digest,
            StudyVersion.number < version.number,
        )
        .limit(1)
    ).first()
    deleted = times_deleted(session, study_key(version.study_instance_uid))
    if earlier is None and not deleted:
        return version.content_digest
    parts = [version.content_digest, str(version.number), *([f"after {deleted}"] if deleted else [])]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _result_id(
    version: StudyVersion, content: str, series_instance_uid: str, part: str, identity: tuple[str, str, str, str]
) -> str:
    """Fixed by what goes in: ordering the same work twice gives the same result."""
    key = "\n".join((version.study_instance_uid, content, series_instance_uid, part, *identity))
    return hashlib.sha256(key.encode()).hexdigest()[:40]
