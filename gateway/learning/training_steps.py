"""Who does the steps of a training run in a worker: cases are written, folds trained, the bundle made, tested, offered.

Each step looks first at what is there already, so that a worker that died anywhere is followed by one that goes on.
"""

from __future__ import annotations

from sqlalchemy import select, update

from engine.bundle import Bundle, load_bundle
from engine.card_of_bundle import card_document
from engine.dataset import open_dataset
from engine.joined_dataset import join_raw, refuse_other_task, refuse_same_names
from engine.json_writer import write_json
from gateway.commands.model_test import ACCEPTED, OUTSIDE_PLAN, REJECTED
from gateway.durable import Enqueuer
from gateway.errors import Permanent
from gateway.learning import runs
from gateway.learning.candidates import consider_promotion
from gateway.learning.case_writing import write_cases
from gateway.learning.lineage import commands_of
from gateway.learning.registration import register_bundle
from gateway.learning.run_commands import RunCommands
from gateway.learning.training_child import TrainingChild
from gateway.model_shelf import ModelShelf
from gateway.settings import Settings
from storage.database import Database
from storage.learning_records import Correction, LearningRun, RunState
from storage.models import ModelRegistry
from storage.records import Result, ResultState
from storage.spool import Spool


def results_wait(database: Database) -> bool:
    """Whether a model is wanted now: a result waits for it, or is being made."""
    waiting = select(Result.result_id).where(Result.state == ResultState.PENDING, Result.runtime.is_(None)).limit(1)
    with database.reading() as session:
        return session.scalars(waiting).first() is not None


class TrainingWork:
    """Steps of `prepare_run`, `train_fold` and `finish_run`."""

    def __init__(
        self,
        *,
        settings: Settings,
        database: Database,
        spool: Spool,
        registry: ModelRegistry,
        shelf: ModelShelf,
        enqueuer: Enqueuer,
        child: TrainingChild,
    ) -> None:
        self._settings = settings
        self._database = database
        self._spool = spool
        self._registry = registry
        self._shelf = shelf
        self._enqueuer = enqueuer
        self._child = child

    def write_cases(self, run_id: str) -> str:
        """New cases and their labels as a raw dataset in nnU-Net's layout."""
        run = self._run(run_id)
        if not self._goes_on(run_id, RunState.TRAINING):
            return "ended"
        commands = self._commands(run)
        bundle = self._base(run)
        if not run.cases:
            if run.kind == "retraining":
                return "written"
            raise Permanent("no case was chosen")
        written = write_cases(
            self._database,
            self._spool,
            [case["result_id"] for case in run.cases],
            commands.cases,
            dataset_json=open_dataset(commands.old).json,
            orientation=bundle.contract.orientation,
        )
        with self._database.session() as session:
            row = runs.get_run(session, run_id, lock=True)
            corrections = dict(written.corrections)
            row.cases = [
                {**case, "case": written.names.get(case["result_id"]), "correction": corrections.get(case["result_id"])}
                | ({"left_out": why} if (why := written.left_out.get(case["result_id"])) else {})
                for case in row.cases or []
            ]
        least = self._settings.learning.of(run.model_name).selection.least
        if len(written.names) < least and run.kind == "fine-tuning":
            why = next(iter(written.left_out.values()), "")
            raise Permanent(
                f"{len(written.names)} of {len(run.cases)} cases could be written, and {least} are needed: {why}"
            )
        return "written"

    def plan(self, run_id: str) -> str:
        """A full training is planned anew, with the old and the new cases; the folds are put on their queue."""
        run = self._run(run_id)
        if runs.has_begun(run):
            return "planned"
        if not self._goes_on(run_id, RunState.TRAINING):
            return "ended"
        commands = self._commands(run)
        if run.kind == "retraining":
            old = open_dataset(commands.old)
            new = open_dataset(commands.cases) if run.cases else None
            if new is not None:
                refuse_other_task(old.json, new.json, what=new.name)
                refuse_same_names(old, new)
            join_raw(old, new, commands.raw)
            self._child.run(commands.plan(), log=commands.log("plan"))
        with self._database.session() as session:
            row = runs.get_run(session, run_id, lock=True)
            runs.begin_folds(session, self._enqueuer, row, commands.folds())
        return "planned"

    def train(self, fold_key: str) -> str:
        """One fold to its validation; paused while studies wait."""
        run_id, _, fold = fold_key.partition("/")
        run = self._run(run_id)
        if run.state != RunState.TRAINING:
            return "ended"
        commands = self._commands(run)
        document = self._child.run(
            commands.train(fold),
            log=commands.log(f"fold-{fold}"),
            pause_file=commands.fold_folder(fold) / "pause",
            wanted=lambda: self._is_wanted(run_id),
        )
        if document.get("state") == "stopped":
            if not self._is_wanted(run_id):
                return "ended"
            raise Permanent(f"fold {fold} was stopped by somebody; `seggate learn retry` goes on")
        return "trained"

    def count(self, fold_key: str) -> str:
        run_id, _, fold = fold_key.partition("/")
        with self._database.session() as session:
            run = runs.get_run(session, run_id, lock=True)
            return "last" if runs.fold_done(session, self._enqueuer, run, fold) else "not the last"

    def export(self, run_id: str) -> str:
        """What was trained is validated, chosen and made a bundle of the next minor version."""
        run = self._run(run_id)
        if not self._goes_on(run_id, RunState.TESTING):
            return "ended"
        commands, base = self._commands(run), self._base(run)
        if not (commands.bundle / "bundle.json").is_file():
            count = len(run.cases or [])
            words = f"{base.name}: {run.kind} of {run.base_version} with {count} new cases."
            write_json(card_document(base, description=words), commands.card)
            folds = list((run.figures or {}).get("folds", {}))
            self._child.run(commands.select(folds), log=commands.log("select"))
            semver = self._next_version(base.name)
            self._child.run(commands.export(name=base.name, semver=semver), log=commands.log("export"))
        return "exported"

    def register(self, run_id: str) -> str:
        """The version, registered as candidate; "ended" where the run was given up."""
        run = self._run(run_id)
        if run.state != RunState.TESTING:
            return "ended"
        bundle = load_bundle(self._commands(run).bundle, verify=True)
        model = register_bundle(self._database, self._registry, bundle, candidate=True, actor="worker")
        with self._database.session() as session:
            row = runs.get_run(session, run_id, lock=True)
            row.semver = model.semver
            learnt = [case["correction"] for case in row.cases or [] if case.get("correction") is not None]
            session.execute(update(Correction).where(Correction.correction_id.in_(learnt)).values(learnt_by=run_id))
        return model.semver

    def examine(self, run_id: str) -> str:
        """The sanity suite's verdict on the candidate; "ended" where the run was given up."""
        run = self._run(run_id)
        if run.state != RunState.TESTING:
            return "ended"
        document = self._child.run(
            [
                *("models", "test", run.model_name, str(run.semver), "--change", run.kind),
                *("--requested-by", run.requested_by, "--config", str(self._settings.folder)),
            ],
            log=self._commands(run).log("test"),
            fine=(ACCEPTED, REJECTED, OUTSIDE_PLAN),
        )
        if "verdict" not in document:
            raise Permanent(f"not examined: {document.get('error') or 'see test.log of the run'}")
        verdict = str(document["verdict"])
        with self._database.session() as session:
            row = runs.get_run(session, run_id, lock=True)
            row.figures = {**(row.figures or {}), "verdict": verdict}
            if row.state != RunState.TESTING:
                return "ended"
            if verdict != "ACCEPTED":
                runs.move(session, row, RunState.REFUSED, f"{verdict}: {'; '.join(map(str, document['reasons']))}")
        return verdict

    def offer(self, run_id: str) -> str:
        """The candidate runs in shadow first where the change plan says so; then it is promoted, or waits for a
        person."""
        run = self._run(run_id)
        plan = self._settings.learning.of(run.model_name).change_plan
        with self._database.session() as session:
            row = runs.get_run(session, run_id, lock=True)
            if row.state not in (RunState.TESTING, RunState.CANDIDATE):
                return "ended"
            runs.move(session, row, RunState.CANDIDATE, "ACCEPTED")
        if plan.shadow_studies:
            self._registry.set_shadow(run.model_name, str(run.semver))
            return "shadow"
        return consider_promotion(self._database, self._registry, self._settings, run.model_name)

    def fail_run(self, run_id: str, step: str, reason: str) -> str:
        with self._database.session() as session:
            return runs.fail_run(session, runs.get_run(session, run_id, lock=True), step, reason)

    def _run(self, run_id: str) -> LearningRun:
        with self._database.reading() as session:
            return runs.get_run(session, run_id)

    def _is_wanted(self, run_id: str) -> bool:
        with self._database.reading() as session:
            return runs.is_wanted(session, run_id)

    def _goes_on(self, run_id: str, state: RunState) -> bool:
        """Whether the run is still wanted; it is in `state` then."""
        with self._database.session() as session:
            run = runs.get_run(session, run_id, lock=True)
            if run.state not in runs.UNDER_WAY:
                return False
            runs.move(session, run, state)
            return True

    def _commands(self, run: LearningRun) -> RunCommands:
        with self._database.reading() as session:
            return commands_of(session, self._settings, run)

    def _base(self, run: LearningRun) -> Bundle:
        """The version that the run begins from."""
        return self._shelf.bundle(self._registry.get(run.model_name, run.base_version))

    def _next_version(self, name: str) -> str:
        """The minor version after all that are registered: other weights, the same labels and channels."""
        known = [tuple(map(int, model.semver.split("."))) for model in self._registry.versions(name)]
        major, minor, _ = max(known)
        return f"{major}.{minor + 1}.0"
