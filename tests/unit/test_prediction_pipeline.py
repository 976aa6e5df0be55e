"""Cases overlap: one is read ahead and one written while the networks run; what fails stops nothing else."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engine.errors import InputRejected, MemoryExceeded
from engine.manifest import Contract
from engine.volume import Geometry, LabelMap, Volume
from gateway.prediction.cases import Case
from gateway.prediction.pipeline import CaseDone, Pipeline, PredictionStopped
from gateway.prediction.runner import Predicted, Runner

WAIT_S = 20
GEOMETRY = Geometry(shape=(2, 2, 2), affine_lps=np.eye(4))
CONTRACT = cast(Contract, None)  # the cases of this test do not look at it


@dataclass
class Invented:
    """A case that notes when it is read."""

    name: str
    on_read: Callable[[], None] = lambda: None
    ending: str = ".nii.gz"
    size_bytes: int = 8
    files: tuple[Path, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def geometry(self) -> Geometry:
        return GEOMETRY

    def doubts(self, contract: Contract) -> list[str]:
        return []

    def read(self) -> Volume:
        self.on_read()
        return Volume(array=np.ones((1, 2, 2, 2), dtype=np.float32), geometry=GEOMETRY)

    def write_labels(self, labels: LabelMap, path: Path) -> None: ...

    def grid_properties(self) -> Mapping[str, Any]:
        return {}


class InventedRunner:
    """Takes what `Runner` takes; `on_predict` runs in place of the networks."""

    def __init__(self, on_predict: Callable[[], None] = lambda: None, *, fits: bool = True) -> None:
        self._on_predict, self._fits = on_predict, fits

    def check_memory(self, geometry: Geometry, *, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and not self._fits:
            raise MemoryExceeded("too much beside")

    def predict(self, volume: Volume, progress: Callable[[float], None]) -> Predicted:
        self._on_predict()
        progress(0.5)
        progress(1.0)
        labels = LabelMap(array=np.zeros((2, 2, 2), dtype=np.uint8), geometry=GEOMETRY)
        return Predicted(labels=labels, segments=(), seconds={"network": 1.0})


def run(
    cases: list[Invented],
    runner: InventedRunner | None = None,
    write: Callable[[Case, Predicted], tuple[Path, ...]] = lambda _case, _predicted: (),
    *,
    ahead: int = 1,
    report: Callable[[Case, float], None] = lambda _case, _share: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[CaseDone]:
    pipeline = Pipeline(
        cast(Runner, runner or InventedRunner()),
        CONTRACT,
        write,
        channels=1,
        ahead=ahead,
        writers=1,
        report=report,
        stop=stop,
    )
    return list(pipeline.run(cast(list[Case], cases)))


def test_the_next_case_is_read_while_the_networks_run() -> None:
    """The networks of the first case end only when the second has been read: in turn, this would wait for ever."""
    second_read = threading.Event()

    def networks() -> None:
        assert second_read.wait(WAIT_S)

    done = run([Invented("a"), Invented("b", second_read.set)], InventedRunner(networks))
    assert [(d.case.name, d.error) for d in done] == [("a", None), ("b", None)]


def test_a_result_is_written_while_the_next_networks_run() -> None:
    first_in_writing, second_predicted = threading.Event(), threading.Event()
    turns: list[str] = []

    def networks() -> None:
        if turns:
            assert first_in_writing.wait(WAIT_S)
            second_predicted.set()
        turns.append("predicted")

    def write(case: Case, _predicted: Predicted) -> tuple[Path, ...]:
        if case.name == "a":
            first_in_writing.set()
            assert second_predicted.wait(WAIT_S)
        return ()

    assert [d.error for d in run([Invented("a"), Invented("b")], InventedRunner(networks), write)] == [None, None]


def test_at_most_as_many_are_read_ahead_as_were_asked_for() -> None:
    read: list[str] = []
    most: list[int] = []
    cases = [Invented(name, lambda name=name: read.append(name)) for name in "abcdef"]  # type: ignore[misc]
    count = iter(range(1, 7))

    def networks() -> None:
        most.append(len(read) - next(count))

    run(cases, InventedRunner(networks))
    assert max(most) <= 1
    assert read == list("abcdef")


def test_nothing_is_read_ahead_where_it_does_not_fit_beside_what_runs() -> None:
    read: list[str] = []
    cases = [Invented(name, lambda name=name: read.append(name)) for name in "abc"]  # type: ignore[misc]
    counts: list[int] = []
    done = run(cases, InventedRunner(lambda: counts.append(len(read)), fits=False))
    assert counts == [1, 2, 3]
    assert [d.error for d in done] == [None, None, None]


def test_a_case_that_fails_in_any_stage_leaves_the_others_alone() -> None:
    def fail() -> None:
        raise InputRejected("is torn")

    def write(case: Case, _predicted: Predicted) -> tuple[Path, ...]:
        if case.name == "d":
            raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/d.nii.gz")
        return (Path(f"{case.name}.nii.gz"),)

    done = run([Invented("a"), Invented("b", fail), Invented("c"), Invented("d"), Invented("e")], write=write)
    assert {d.case.name: d.error for d in done} == {
        "a": None,
        "b": "is torn",
        "c": None,
        "d": "d.nii.gz: Permission denied",
        "e": None,
    }
    assert [d.case.name for d in done] == list("abcde")
    assert set(done[0].seconds) == {"read", "network", "write"}


def test_a_full_disk_ends_the_call() -> None:
    def write(_case: Case, _predicted: Predicted) -> tuple[Path, ...]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run([Invented("a"), Invented("b"), Invented("c")], write=write)


def test_a_stop_leaves_between_two_windows_and_what_was_done_is_written() -> None:
    written: list[str] = []
    asked = threading.Event()

    def write(case: Case, _predicted: Predicted) -> tuple[Path, ...]:
        written.append(case.name)
        return ()

    def report(case: Case, share: float) -> None:
        if case.name == "b" and share == 0.5:
            asked.set()

    with pytest.raises(PredictionStopped):
        run([Invented("a"), Invented("b"), Invented("c")], write=write, report=report, stop=asked.is_set)
    assert written == ["a"]
