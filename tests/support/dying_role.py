"""A process of the gateway that dies, or gets stuck, where a test says: the real code with a boundary plugged in.

    python -m tests.support.dying_role worker --config DIR [--lives]
    python -m tests.support.dying_role supervise --config DIR --roles worker

A test puts a file named after a point into the folder $DYING_ROLE_CONTROL:

    kill-<point>    kill -9 of the process when it next comes there, once (the file becomes died-<point>)
    block-<point>   stay there as long as the file exists (reached-<point> says that it was reached)

Points are the boundaries of the story's steps (`infer:begin` is before the step, `infer:end` between its own commit
and DBOS's note of it), `predict` and `predict-<version>` (in the middle of an inference), `withdraw-<model>` (a
rollback is in table and registry, and no result has followed), `attempt-<destination>:begin` and `:end` as for a step,
`<destination>:sent` (the destination has answered, and nobody has written that down), `alias-<alias>` (the model
registry has moved an alias).

With --lives a dead process is followed by a new one that need not import everything again: each life is a fork of a
parent that does nothing else. `supervise` runs the gateway's own supervisor over processes of this kind.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emr.client import EmrClient
from emr.content import ReportContent
from emr.receipt import ReportReceipt
from engine.predictor import Prediction
from engine.volume import Volume
from gateway import app
from gateway.delivery.destination import ObjectStatus, OutgoingObject
from gateway.delivery.dimse import DimsePacs
from gateway.delivery.dispatch import Dispatch
from gateway.delivery.reporting import Reporting
from gateway.learning.rollback import Withdrawal
from gateway.logs import configure
from gateway.model_shelf import ModelShelf
from gateway.results.rehearsal import rehearse
from gateway.role import _end_with_parent
from gateway.settings import Settings, load_settings
from gateway.state import prepare_state
from gateway.stop_signal import set_on_stop_signals
from gateway.supervisor import Supervisor
from storage.learning_records import ServingPeriod
from storage.models import ModelRegistry, RegisteredModel
from storage.records import Delivery


def boundary(point: str) -> None:
    """Told of every point that is passed; may not return."""
    control = Path(os.environ["DYING_ROLE_CONTROL"])
    try:
        # Renaming is atomic: of several threads or lives only one dies of one file.
        os.rename(control / f"kill-{point}", control / f"died-{point}")
    except FileNotFoundError:
        pass
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    block = control / f"block-{point}"
    while block.exists():
        (control / f"reached-{point}").write_text(str(os.getpid()))
        time.sleep(0.05)


class _Shelf(ModelShelf):
    def predict(
        self,
        model: RegisteredModel,
        volume: Volume,
        *,
        budget_bytes: int | None,
        progress: Callable[[float], None] | None = None,
    ) -> Prediction:
        boundary("predict")
        boundary(f"predict-{model.semver}")

        def between_windows(share: float) -> None:
            boundary(f"window-{model.name}")
            if progress is not None:
                progress(share)

        return super().predict(model, volume, budget_bytes=budget_bytes, progress=between_windows)


class _Withdrawal(Withdrawal):
    def withdraw(self, period: ServingPeriod, stable: RegisteredModel, *, at_most: int | None = None) -> bool:
        boundary(f"withdraw-{period.model_name}")
        return super().withdraw(period, stable, at_most=at_most)


class _Dispatch(Dispatch):
    def attempt(self, delivery_id: str, turn: str) -> dict[str, Any]:
        with self._database.reading() as session:
            destination = session.get_one(Delivery, delivery_id).destination
        boundary(f"attempt-{destination}:begin")
        outcome = super().attempt(delivery_id, turn)
        boundary(f"attempt-{destination}:end")
        return outcome


class _Pacs(DimsePacs):
    def send(self, objects: Sequence[OutgoingObject]) -> tuple[ObjectStatus, ...]:
        statuses = super().send(objects)
        boundary("pacs:sent")
        return statuses


class _Emr(EmrClient):
    def send(self, content: ReportContent) -> ReportReceipt:
        receipt = super().send(content)
        boundary("emr:sent")
        return receipt


class _Registry(ModelRegistry):
    def _point(self, name: str, alias: str, model: RegisteredModel | None) -> None:
        super()._point(name, alias, model)
        boundary(f"alias-{alias}")


def plug_in() -> None:
    """Put the points into the composition root; the parts themselves are the real ones."""
    kinds = {"ModelShelf": _Shelf, "Withdrawal": _Withdrawal, "Dispatch": _Dispatch}
    for name, kind in {**kinds, "DimsePacs": _Pacs, "EmrClient": _Emr}.items():
        setattr(app, name, kind)
    registry = "open_registry"  # app's own name for it
    setattr(app, registry, lambda settings: _Registry(settings.models_dir, url=settings.gateway.database.registry_url))


def live(group: str, settings: Settings, roles: tuple[str, ...]) -> None:
    """One life of a process, until SIGTERM."""
    stop = threading.Event()
    set_on_stop_signals(stop)
    configure(settings.logging, process=group)
    if group == "worker":
        app.run_worker(settings, stop=stop, boundary=boundary)
    else:
        app.run_services(settings, roles=roles, stop=stop, boundary=boundary)


def prepare_lives() -> None:
    """Import in the parent what a life would import, so that a new life begins at once; nothing is opened here."""
    importlib.import_module("mlflow.tracking")
    rehearse()
    Reporting.rehearse()
    assert threading.active_count() == 1, "a fork would lose the other threads"


def live_again(group: str, settings: Settings, roles: tuple[str, ...]) -> int:
    """Lives one after the other, until SIGTERM; a life that ends in another way than kill -9 ends this, too."""
    child = 0
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        if child:
            os.kill(child, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    parent = os.getpid()
    while not ended:
        child = os.fork()
        if child == 0:
            # A parent that is told to end at this very moment knows no child yet.
            _end_with_parent(parent)
            live(group, settings, roles)
            os._exit(0)
        if ended:
            os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return os.waitstatus_to_exitcode(status)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.dying_role")
    parser.add_argument("group", choices=("worker", "services", "supervise"))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--roles", default="delivery")
    parser.add_argument("--parent", type=int, default=0)
    parser.add_argument("--lives", action="store_true")
    options = parser.parse_args()
    settings = load_settings(options.config)
    roles = tuple(options.roles.split(","))
    if options.group == "supervise":
        configure(settings.logging, process="supervisor")
        database = prepare_state(settings)
        return Supervisor(
            options.config, roles, database=database, drain_s=5, check_s=0.1, entry="tests.support.dying_role"
        ).run()
    _end_with_parent(options.parent)
    plug_in()
    if options.lives:
        prepare_lives()
        return live_again(options.group, settings, roles)
    live(options.group, settings, roles)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
