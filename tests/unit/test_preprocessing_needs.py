"""engine.preprocessing_needs against what preprocessing takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from engine import preprocessing_needs
from engine.dataset import open_dataset
from engine.errors import MemoryExceeded
from engine.plans import read_plans
from engine.preprocessed import PreprocessJob, preprocess_dataset
from engine.preprocessing_needs import case_peak_bytes, fitting_processes, needed_bytes
from tests.support.raw_datasets import SPACING_ZYX, write_dataset
from tests.support.tiny_models import configuration_json, plans_json

SHAPE = (40, 90, 100)


@pytest.fixture
def job(tmp_path: Path) -> PreprocessJob:
    """Two channels, resampled in the plane (2D) and along all axes."""
    write_dataset(tmp_path / "raw", cases=2, channels=2, shape=SHAPE)
    schemes = ("ZScoreNormalization",) * 2
    configurations = {
        "2d": configuration_json((16, 16), (0.6, 0.6), schemes=schemes),
        "3d_fullres": configuration_json((16, 16, 16), (1.1, 0.6, 0.6), schemes=schemes),
    }
    for configuration in configurations.values():
        configuration["resampling_fn_data_kwargs"] = {**configuration["resampling_fn_data_kwargs"], "order": 3}
    plans = read_plans(plans_json(configurations))
    return PreprocessJob(
        plans=plans,
        configurations=tuple(plans.configurations.values()),
        dataset_json=open_dataset(tmp_path / "raw").json,
        folders={name: tmp_path / name for name in plans.configurations},
    )


def test_the_estimate_of_disk_space_holds(tmp_path: Path, job: PreprocessJob) -> None:
    dataset = open_dataset(tmp_path / "raw")
    preprocess_dataset(job, dataset.cases, processes=1)
    arrays = [path for folder in job.folders.values() for path in folder.glob("*.npy")]
    written = sum(path.stat().st_size for path in arrays)
    needed = needed_bytes(job, [SHAPE] * 2, [SPACING_ZYX] * 2)
    assert needed <= written <= needed + 256 * len(arrays)


def test_the_estimate_of_memory_holds_and_is_not_far_off(
    tmp_path: Path, job: PreprocessJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocessing_needs, "_WORKER", 0)
    dataset = open_dataset(tmp_path / "raw")
    preprocess_dataset(job, dataset.cases[:1], processes=1)  # what is loaded and cached once
    tracemalloc.start()
    try:
        preprocess_dataset(job, dataset.cases[1:], processes=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= case_peak_bytes(job, SHAPE, SPACING_ZYX) <= 2 * peak


def test_fewer_workers_where_memory_does_not_do_for_the_largest_cases_at_once(job: PreprocessJob) -> None:
    shapes = [SHAPE, (200, 300, 300), (150, 300, 300), (10, 10, 10)]
    spacings = [SPACING_ZYX] * 4
    peaks = sorted(case_peak_bytes(job, shape, SPACING_ZYX) for shape in shapes)

    def fitting(free_bytes: int, processes: int = 3) -> int:
        return fitting_processes(job, shapes, spacings, processes=processes, free_bytes=free_bytes)

    assert fitting(sum(peaks[1:])) == 3
    assert fitting(sum(peaks[1:]) - 1) == 2
    assert fitting(sum(peaks[2:]) - 1) == 1
    assert fitting(sum(peaks), processes=9) == 4
    with pytest.raises(MemoryExceeded, match=r"needs about [\d,]+ MiB and [\d,]+ MiB are free"):
        fitting(peaks[-1] - 1)
