"""Who does the steps of the story in a worker: thin, each method is one step, the work is in the named modules."""

from __future__ import annotations

from collections.abc import Callable, Collection

from gateway import parking, superseding
from gateway.delivery.release import Release
from gateway.intake.routes_file import RoutesFile
from gateway.intake.routing import HeaderReader, route_version
from gateway.model_shelf import ModelShelf
from gateway.results.encoding import Encoding
from gateway.results.inference import Inference
from gateway.results.orders import Orders
from gateway.results.quality import judge, source_doubts
from storage import ledger
from storage.database import Database
from storage.records import Result, ResultState, StudyVersion


class StudyWork:
    """Steps of `process_study`."""

    def __init__(
        self,
        *,
        database: Database,
        routes: RoutesFile,
        headers: HeaderReader,
        orders: Orders,
        canary_ae: str | None = None,
    ) -> None:
        self._database = database
        self._canary_ae = canary_ae
        self._routes = routes
        self._headers = headers
        self._orders = orders

    def route(self, version_id: str) -> str:
        """ "matched", "unmatched" or "review"."""
        outcome = route_version(
            self._database, self._headers, version_id, self._routes.current(), canary_ae=self._canary_ae
        ).outcome
        if outcome == "unmatched":
            # Nothing will be ordered, so nobody else tells what becomes of the older results (CMP-17).
            with self._database.session() as session:
                superseding.no_longer_wanted(session, session.get_one(StudyVersion, version_id))
        return outcome

    def order(self, version_id: str) -> str:
        return self._orders.order(version_id)

    def park_study(self, version_id: str, step: str, reason: str) -> str:
        """The study is FAILED with the step and the reason, alarmed; `seggate retry` puts it back."""
        with self._database.session() as session:
            return parking.park_study(session, version_id, step, reason)


class ResultWork:
    """Steps of `make_result`.

    `watch(model name)` is told of each result that was judged or parked, and may withdraw the version that made it;
    `shadow(result_id)` of each that was judged.
    """

    def __init__(
        self,
        *,
        database: Database,
        inference: Inference,
        encoding: Encoding,
        release: Release,
        shelf: ModelShelf,
        disabled_checks: Collection[str],
        watch: Callable[[str], None] = lambda _name: None,
        shadow: Callable[[str], None] = lambda _result_id: None,
    ) -> None:
        self._watch = watch
        self._shadow = shadow
        self._database = database
        self._inference = inference
        self._encoding = encoding
        self._release = release
        self._shelf = shelf
        self._disabled_checks = disabled_checks

    def infer(self, result_id: str) -> str:
        return self._inference.infer(result_id)

    def judge(self, result_id: str) -> str:
        """The QA verdict, kept with every check; "superseded" where the version of the model was withdrawn."""
        with self._database.reading() as session:
            known = session.get_one(Result, result_id)
        verdict = self._judged(known)
        # Outside the transaction and each time: who dies in between is told again.
        self._watch(known.model_name)
        self._shadow(result_id)
        with self._database.reading() as session:
            state = session.get_one(Result, result_id).state
        return "superseded" if state == ResultState.SUPERSEDED else verdict

    def _judged(self, known: Result) -> str:
        result_id = known.result_id
        # Before the transaction: hashing the weights of a large model must not keep other writers waiting.
        bundle = self._shelf.bundle(self._shelf.version(known.model_name, known.model_version))
        with self._database.session() as session:
            result = session.get_one(Result, result_id, with_for_update=True)
            if result.state == ResultState.SUPERSEDED:
                return "superseded"
            if result.verdict is not None:
                return result.verdict
            version, runtime = session.get_one(StudyVersion, result.version_id), result.runtime or {}
            doubts = source_doubts(
                version.rule,
                version.evidence,
                series_instance_uid=result.series_instance_uid,
                missing_slices=runtime.get("missing_slices", 0),
            )
            verdict, checks = judge(
                result.measurements or [],
                mean_confidence=runtime.get("mean_confidence"),
                bundle=bundle,
                doubts=doubts,
                disabled=self._disabled_checks,
            )
            result.verdict, result.checks = str(verdict), [c.to_json() for c in checks]
            ledger.append(
                session,
                subject=ledger.study_subject(result.study_instance_uid),
                kind="judged",
                actor="worker",
                detail={"result_id": result_id, "verdict": str(verdict), "checks": result.checks},
            )
            return str(verdict)

    def encode(self, result_id: str) -> str:
        return self._encoding.encode(result_id)

    def release(self, result_id: str) -> str:
        return self._release.release(result_id)

    def park_result(self, result_id: str, step: str, reason: str) -> str:
        """The result is FAILED with the step and the reason, alarmed; what was computed is kept."""
        with self._database.session() as session:
            outcome = parking.park_result(session, result_id, step, reason)
            if outcome == parking.DELETED:
                return outcome
            model_name = session.get_one(Result, result_id).model_name
        self._watch(model_name)
        return outcome
