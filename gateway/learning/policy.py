"""What a drift leads to, what the nightly look at waiting cases does, and when a model is trained from the beginning.

    drift ─▶ a fine-tuning is asked for ─▶ enough labelled cases: queued; too few: it waits, and readers are asked
    each night ─▶ what waits is looked at again
    retraining_cron ─▶ a full training of every model that has new labelled cases

None of them changes what serves.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from gateway.durable import Enqueuer
from gateway.learning import runs
from gateway.learning.case_choice import CaseChoice, choose_cases
from gateway.learning.promotion import POLICY
from gateway.learning_settings import ModelLearning
from gateway.monitoring.drift_window import ModelDrift
from gateway.monitoring.review_tasks import open_task
from gateway.settings import Settings
from storage import ledger
from storage.database import Database
from storage.errors import ModelMissing
from storage.learning_records import LearningRun, RunState
from storage.models import ModelRegistry
from storage.records import utc_now


class LearningPolicy:
    """`registry` says which version serves; it is asked outside of transactions."""

    def __init__(self, *, database: Database, enqueuer: Enqueuer, registry: ModelRegistry, settings: Settings) -> None:
        self._database = database
        self._enqueuer = enqueuer
        self._registry = registry
        self._settings = settings
        self._learning = settings.learning

    def after_drift(self, found: Sequence[ModelDrift]) -> str:
        """For each model that has drifted and whose policy says so a fine-tuning; a sentence on what was asked for."""
        asked = []
        for name in sorted({drift.model_name for drift in found if drift.report.severity != "none"}):
            learning = self._learning.of(name)
            if learning.on_drift != "fine-tune" or not learning.can_learn:
                continue
            streams = sorted({f.name for d in found if d.model_name == name for f in d.report.drifted})
            run = self.ask_for(learning, "fine-tuning", requested_by=POLICY, reason=f"drift of {', '.join(streams)}")
            if run is not None:
                asked.append(f"{name}: fine-tuning {run.state}")
        return "; ".join(asked)

    def ask_for(
        self, learning: ModelLearning, kind: runs.Kind, *, requested_by: str, reason: str
    ) -> LearningRun | None:
        """None where a run is under way, or a candidate waits for its decision; for the policy also where the last one
        failed: somebody has to see why first."""
        try:
            champion = self._registry.champion(learning.name)
        except ModelMissing:
            return None
        with self._database.session() as session:
            ledger.hold(session, ledger.model_subject(learning.name))  # two that ask at once get one
            runs.close_decided(session, learning.name)
            known = runs.runs_of(session, learning.name)
            if any(run.state in (*runs.UNDER_WAY, RunState.CANDIDATE) for run in known):
                return None
            if requested_by == POLICY and known and known[0].state == RunState.FAILED:
                return None
            choice = self._choice(session, learning)
            run = runs.request_run(
                session,
                self._enqueuer,
                choice,
                kind=kind,
                base_version=champion.semver,
                requested_by=requested_by,
                reason=reason,
            )
            if run.state == RunState.WAITING:
                self._ask_readers(session, run, choice)
            return run

    def look_at_waiting(self) -> str:
        """Runs that wait for labels are queued once there are enough. The job `learning`."""
        with self._database.reading() as session:
            waiting = [run.run_id for run in runs.runs_of(session, None, [RunState.WAITING])]
        said = [self._look_at(run_id) for run_id in waiting]
        return "; ".join(said) or "nothing waits for labels"

    def retrain_all(self) -> str:
        """A full training of every model that has labelled cases which no training has seen. The job `retraining`."""
        said = []
        for learning in self._learning.models:
            if not learning.can_learn:
                continue
            with self._database.reading() as session:
                choice = self._choice(session, learning)
            if not choice.ready:
                said.append(f"{learning.name}: {choice.sentence}")
                continue
            run = self.ask_for(learning, "retraining", requested_by=POLICY, reason="retraining_cron")
            said.append(f"{learning.name}: {'one is under way' if run is None else run.state}")
        return "; ".join(said) or "no model is set up for training (learning.toml)"

    def _look_at(self, run_id: str) -> str:
        with self._database.session() as session:
            run = runs.get_run(session, run_id, lock=True)
            if run.state != RunState.WAITING:
                return f"{run.model_name}: {run.state}"
            choice = self._choice(session, self._learning.of(run.model_name))
            if choice.ready:
                runs.queue_run(session, self._enqueuer, run, choice)
                runs.close_label_task(session, run, by=POLICY, outcome=choice.sentence)
            else:
                runs.move(session, run, RunState.WAITING, choice.sentence)
                self._ask_readers(session, run, choice)
            return f"{run.model_name}: {run.state}, {choice.sentence}"

    def _choice(self, session: Session, learning: ModelLearning) -> CaseChoice:
        return choose_cases(session, learning, now=utc_now(), canary=self._settings.gateway.canary)

    @staticmethod
    def _ask_readers(session: Session, run: LearningRun, choice: CaseChoice) -> None:
        open_task(
            session,
            kind=runs.LABEL,
            model_name=run.model_name,
            model_version=run.base_version,
            subject=runs.label_subject(run),
            summary=f"{choice.sentence}; `seggate corrections export` writes what is to be read",
            result_ids=[case.result_id for case in choice.waiting],
            picture=None,
        )
