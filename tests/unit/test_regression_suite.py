"""engine.regression_suite: both versions on every case, as in production, and timed on the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from engine.case_figures import CaseFigures, FigureStore
from engine.errors import InputRejected, MemoryExceeded
from engine.locked_cases import LockedCases, open_locked, read_locked
from engine.nifti import read_nifti, write_image
from engine.predictor import Predictor
from engine.regression_suite import TIMED, Version, run_suite
from engine.version_comparison import compare_versions
from tests.support.intensity_model import PHANTOM_BANDS, SWAPPED_BANDS, write_intensity_bundle
from tests.support.locked_dataset import DIM_BANDS, GRIDS, RIGHT_VOXELS, write_locked

BANDS = {"good": PHANTOM_BANDS, "dim": DIM_BANDS, "swapped": SWAPPED_BANDS}
DARK = 36


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Predictor]]:
    root = tmp_path_factory.mktemp("bundles")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                Predictor(write_intensity_bundle(root / name, name=name, bands=bands), device="cpu", threads=1)
            )
            for name, bands in BANDS.items()
        }


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> LockedCases:
    """Five cases on grids of all kinds; in the last one DARK voxels are brighter than a dim model sees."""
    folder = write_locked(tmp_path_factory.mktemp("cases") / "locked", cases=5, bright=(0, 0, 0, 0, DARK))
    return read_locked(open_locked(folder))


def _version(predictor: Predictor, folder: Path | None = None) -> Version:
    bundle = predictor.bundle
    store = FigureStore(
        folder,
        weights_digest=bundle.weights_digest,
        configuration_digest=bundle.configuration_digest,
        runtime=predictor.runtime,
        labels=bundle.label_manager,
    )
    return Version(predictor=predictor, store=store)


def _dice(figures: tuple[CaseFigures, ...] | None, value: int) -> list[float | None]:
    assert figures is not None
    return [found.metrics[(value,)].dice for found in figures]


@pytest.mark.requirement("ART-23")
def test_a_right_answer_is_perfect_on_oblique_reversed_and_turned_grids(
    predictors: dict[str, Predictor], locked: LockedCases
) -> None:
    assert len(GRIDS) == 4
    shares: list[float] = []
    found = run_suite(locked, _version(predictors["good"]), progress=shares.append)
    assert _dice(found.candidate, 1) == [1.0] * 5
    assert _dice(found.candidate, 2) == [1.0] * 5
    assert [figures.metrics[(1,)].hd95_mm for figures in found.candidate] == [0.0] * 5
    assert all(figures.seconds > 0 and figures.peak_bytes > 0 for figures in found.candidate)
    assert (found.champion, found.timing) == (None, None)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_what_a_worse_version_loses_is_known_to_the_voxel(
    predictors: dict[str, Predictor], locked: LockedCases
) -> None:
    found = run_suite(locked, _version(predictors["dim"]), _version(predictors["good"]))
    kept = RIGHT_VOXELS - DARK
    assert _dice(found.candidate, 2) == [1.0, 1.0, 1.0, 1.0, pytest.approx(2 * kept / (kept + RIGHT_VOXELS))]
    assert _dice(found.champion, 2) == [1.0] * 5
    comparison = compare_versions(found, predictors["good"].bundle.label_manager.foreground)
    assert comparison.label_dice["right structure"].loss == pytest.approx((1 - 2 * kept / (kept + RIGHT_VOXELS)) / 5)
    assert comparison.label_dice["left structure"].loss == 0.0


def test_swapped_sides_lose_everything(predictors: dict[str, Predictor], locked: LockedCases) -> None:
    found = run_suite(locked, _version(predictors["swapped"]))
    assert _dice(found.candidate, 1) == [0.0] * 5


def test_the_largest_cases_are_timed_and_every_time_is_of_this_run(
    predictors: dict[str, Predictor], locked: LockedCases
) -> None:
    found = run_suite(locked, _version(predictors["good"]), _version(predictors["dim"]))
    assert found.timing is not None
    assert len(found.timing.cases) == TIMED
    assert set(found.timing.cases) <= {case.name for case in locked.cases}
    assert min(*found.timing.candidate_s, *found.timing.champion_s) > 0


class _Counting(Predictor):
    """Says which cases it ran on, by their voxels."""

    runs: list[tuple[int, ...]]

    def predict(self, *arguments: object, **options: object) -> object:  # type: ignore[override]
        self.runs.append(arguments[0].array.shape)  # type: ignore[attr-defined]
        return super().predict(*arguments, **options)  # type: ignore[arg-type]


def test_figures_of_the_champion_are_kept_and_only_timed_cases_run_again(
    predictors: dict[str, Predictor], locked: LockedCases, tmp_path: Path
) -> None:
    with _Counting(predictors["good"].bundle, device="cpu", threads=1) as champion:
        champion.runs = []
        first = run_suite(locked, _version(predictors["dim"]), _version(champion, tmp_path))
        assert (first.known, len(champion.runs)) == (0, 5 + TIMED)
        champion.runs = []
        again = run_suite(locked, _version(predictors["dim"]), _version(champion, tmp_path))
        assert (again.known, len(champion.runs)) == (5, 2 * TIMED)
        assert again.champion == first.champion
        champion.runs = []
        store = _version(champion, tmp_path).store
        assert store.get(locked.cases[0].digest) is not None
        assert store.get("another case") is None


@pytest.mark.parametrize("changed", ["weights_digest", "configuration_digest", "runtime"])
def test_figures_of_another_bundle_or_runtime_are_not_taken(
    predictors: dict[str, Predictor], locked: LockedCases, tmp_path: Path, changed: str
) -> None:
    predictor = predictors["good"]
    run_suite(locked, _version(predictor, tmp_path))
    bundle, digest = predictor.bundle, locked.cases[0].digest
    identity = {
        "weights_digest": bundle.weights_digest,
        "configuration_digest": bundle.configuration_digest,
        "runtime": predictor.runtime,
    }
    assert FigureStore(tmp_path, **identity, labels=bundle.label_manager).get(digest) is not None
    # The file's name has 16 digits only; what differs beyond them differs all the same.
    identity[changed] += "f"
    assert FigureStore(tmp_path, **identity, labels=bundle.label_manager).get(digest) is None


def test_figures_of_another_release_are_not_taken(
    predictors: dict[str, Predictor], locked: LockedCases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = locked.cases[0].digest
    run_suite(locked, _version(predictors["good"], tmp_path))
    assert _version(predictors["good"], tmp_path).store.get(digest) is not None
    monkeypatch.setattr("engine.case_figures.this_software", lambda: "seggate 999.0.0")
    assert _version(predictors["good"], tmp_path).store.get(digest) is None


def test_a_torn_file_of_figures_is_made_again(
    predictors: dict[str, Predictor], locked: LockedCases, tmp_path: Path
) -> None:
    run_suite(locked, _version(predictors["good"], tmp_path))
    path = next(tmp_path.glob("*.json"))
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert _version(predictors["good"], tmp_path).store.get(locked.cases[0].digest) is None
    path.write_text(whole.replace('"hd95_mm": 0.0', '"hd95_mm": "none"'))
    assert _version(predictors["good"], tmp_path).store.get(locked.cases[0].digest) is None


def test_a_case_that_cannot_be_predicted_is_named(predictors: dict[str, Predictor], tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "locked", cases=2)
    path = folder / "imagesTr" / "case_01_0000.nii.gz"
    volume = read_nifti([path])
    write_image(np.zeros_like(volume.array[0]), volume.geometry, path)
    with pytest.raises(InputRejected, match="case_01"):
        run_suite(read_locked(open_locked(folder)), _version(predictors["good"]))


def test_what_does_not_fit_into_memory_is_no_figure(predictors: dict[str, Predictor], locked: LockedCases) -> None:
    with pytest.raises(MemoryExceeded):
        run_suite(locked, _version(predictors["good"]), budget_bytes=1000)
