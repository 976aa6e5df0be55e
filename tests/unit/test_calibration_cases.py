"""engine.calibration_cases: each case through the fold that never saw it, once, and resumed where it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.calibration_cases import calibrate_bundle, describe
from engine.dataset import open_dataset
from engine.errors import MemoryExceeded
from engine.experiment import Experiment
from engine.predictor import Predictor
from engine.quality_estimate import ENTROPY, Estimate, Evidence, estimate
from tests.support.raw_datasets import write_array, write_dataset
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle

SHAPE = (8, 8, 8)


class _Interrupted(Exception):
    pass


@dataclass(frozen=True)
class Setting:
    bundle: Bundle
    experiment: Experiment
    results: Path

    def run(self, **options: Any) -> Any:
        return calibrate_bundle(self.bundle, self.experiment, ["0", "1"], self.results, **options)

    @property
    def lines(self) -> list[dict[str, Any]]:
        (file,) = self.results.rglob("*.jsonl")
        return [json.loads(text) for text in file.read_text().splitlines() if text]


def setting(root: Path, *, cases: int = 24, patients: dict[str, str] | None = None) -> Setting:
    """Label 1 is what is brighter than 10; fold 0 finds what is above 10, fold 1 what is above 14. In case n, n + 5
    voxels have a brightness between, so that fold 1 misses them."""
    raw = root / "Dataset902_Bright"
    write_dataset(raw, cases=cases, labels={"background": 0, "one": 1}, patients=patients)
    for index in range(cases):
        image = np.full(SHAPE, 5.0, dtype=np.float32)
        image[2:6, 2:6, 2:6] = 20.0
        image.reshape(-1)[-(index + 5) :] = 12.0
        write_array(raw / "imagesTr" / f"case_{index:02}_0000.nii.gz", image, (1.0, 1.0, 1.0))
        write_array(raw / "labelsTr" / f"case_{index:02}.nii.gz", (image > 10).astype(np.uint8), (1.0, 1.0, 1.0))
    for fold, limit in enumerate((10, 14)):
        write_pointwise_network(
            root / "bundle" / "3d_fullres" / f"fold_{fold}.onnx",
            np.array([[0], [1]], dtype=np.float32),
            np.array([0, -limit], dtype=np.float32),
            SHAPE,
        )
    bundle = write_tiny_bundle(
        root / "bundle",
        labels={"background": 0, "one": 1},
        configurations={"3d_fullres": configuration_json(SHAPE, (1.0, 1.0, 1.0))},
    )
    folder = root / "preprocessed" / raw.name
    folder.mkdir(parents=True)
    names = [f"case_{index:02}" for index in range(cases)]
    splits = [{"train": names[1 - fold :: 2], "val": names[fold::2]} for fold in range(2)]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    experiment = Experiment(name=raw.name, dataset=open_dataset(raw), folder=folder, plans_json={}, plans=bundle.plans)
    return Setting(bundle=bundle, experiment=experiment, results=root / "results")


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The folds of every prediction that is made."""
    seen: list[Any] = []
    real = Predictor.predict

    def spy(self: Predictor, volume: Any, **options: Any) -> Any:
        seen.append(options["folds"])
        return real(self, volume, **options)

    monkeypatch.setattr(Predictor, "predict", spy)
    return iter([seen])


@pytest.mark.requirement("ART-16")
def test_each_case_is_judged_by_the_fold_that_never_saw_it_against_its_reference(tmp_path: Path) -> None:
    here = setting(tmp_path)
    progress: list[tuple[int, int]] = []
    calibration = here.run(progress=lambda done, total: progress.append((done, total)))
    assert progress[0] == (0, 24)
    assert progress[-1] == (24, 24)
    worth = {line["case"]: line["segments"]["one"] for line in here.lines}
    assert len(worth) == 24
    for index in range(24):
        segment = worth[f"case_{index:02}"]
        missed = 0 if index % 2 == 0 else index + 5
        assert segment["dice"] == pytest.approx(2 * (64 + index + 5 - missed) / (2 * (64 + index + 5) - missed))
        assert (segment["hd95_mm"] > 0) == (missed > 0)
        assert segment["components"] == (1 if missed else 2)
        assert segment["fold_dice"] is None
        assert 0 <= segment["border_entropy"] <= 1
    label = calibration.labels["one"]
    assert (label.cases, label.patients, label.missed, label.rightly_empty) == (24, 24, 0, 0)


def test_what_the_predictor_sees_later_is_judged_by_it(tmp_path: Path) -> None:
    here = setting(tmp_path)
    calibration = here.run()
    from engine.dataset import read_case

    with Predictor(here.bundle, device="cpu", threads=1) as predictor:
        volume = read_case(here.experiment.dataset.cases[3], here.experiment.dataset.json).volume
        (segment,) = predictor.predict(volume).segments
    found = estimate(calibration.labels["one"], Evidence.of(vars(segment)))
    assert isinstance(found, Estimate)
    assert segment.fold_dice is not None
    assert found.dice_lower <= segment.fold_dice
    assert ENTROPY in calibration.labels["one"].ranges


@pytest.mark.requirement("ART-13")
def test_interrupted_it_goes_on_with_the_cases_that_are_missing(tmp_path: Path, predicted: Iterator[list[Any]]) -> None:
    here, seen = setting(tmp_path), next(predicted)

    def interrupt(done: int, _total: int) -> None:
        if done == 7:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        here.run(progress=interrupt)
    assert len(here.lines) == 7
    (file,) = here.results.rglob("*.jsonl")
    with file.open("a") as stream:  # a line that was cut off in the middle
        stream.write('\n{"case": "case_20", "sta')
    finished = here.run()
    assert len(seen) == 24
    assert set(map(tuple, seen)) == {("0",), ("1",)}
    assert here.run() == finished
    assert len(seen) == 24
    assert finished == setting(tmp_path / "again").run()


def test_a_case_whose_files_changed_is_predicted_again(tmp_path: Path, predicted: Iterator[list[Any]]) -> None:
    here, seen = setting(tmp_path), next(predicted)
    here.run()
    label = here.experiment.dataset.cases[5].label
    write_array(label, np.ones(SHAPE, dtype=np.uint8), (1.0, 1.0, 1.0))
    here.run()
    assert len(seen) == 25
    other = write_tiny_bundle(
        here.bundle.root,
        labels={"background": 0, "one": 1},
        configurations={"3d_fullres": configuration_json(SHAPE, (1.0, 1.0, 1.0))},
        postprocessing={"postprocessing_fns": [], "postprocessing_kwargs": []},
    )
    calibrate_bundle(other, here.experiment, ["0", "1"], here.results)
    assert len(seen) == 49


def test_cases_of_one_patient_stay_together(tmp_path: Path) -> None:
    here = setting(tmp_path, patients={f"case_{index:02}": str(index // 4) for index in range(24)})
    label = here.run().labels["one"]
    assert (label.cases, label.patients) == (24, 6)
    assert label.dice.margin is None


def test_with_few_cases_nothing_is_predicted_and_a_note_says_why(
    tmp_path: Path, predicted: Iterator[list[Any]]
) -> None:
    here = setting(tmp_path, cases=6)
    found = here.run()
    assert not found.labels
    assert found.notes == ("6 cases were validated; an estimate of quality without a reference needs 20",)
    assert next(predicted) == []
    assert describe(found) == ""


def test_a_case_that_does_not_fit_into_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = setting(tmp_path)
    monkeypatch.setattr("engine.memory.available_bytes", lambda: 1)
    with pytest.raises(MemoryExceeded, match=r"calibration, case_00: .*--no-calibration exports without"):
        here.run()


def test_what_it_is_worth_is_said_in_a_sentence(tmp_path: Path) -> None:
    text = describe(setting(tmp_path).run())
    assert text.startswith("Estimate of quality without a reference, cross-fitted on 24 cases: the lower 90 % bound")
    assert "rank correlation of estimated and true Dice" in text
    assert text.endswith(".")
