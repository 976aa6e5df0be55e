"""engine.fingerprint: nnU-Net's numbers, from less memory."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from engine import fingerprint as module
from engine.dataset import RawDataset, open_dataset
from engine.errors import DatasetInvalid, InputRejected
from engine.fingerprint import CaseSummary, Fingerprint, extract_fingerprint, read_fingerprint
from tests.support.raw_datasets import write_array, write_dataset

# What nnU-Net 2.8.1 computes for every tenth case of the hippocampus set.
TWENTY = {
    "max": 425752.40625,
    "mean": 18788.07421875,
    "median": 374.6175537109375,
    "min": 5.0,
    "percentile_00_5": 28.0,
    "percentile_99_5": 277234.125,
    "std": 57389.41015625,
}


def _by_nnunets_rule(folder: Path, samples: int, channels: int) -> list[dict[str, float]]:
    """The rule as nnU-Net writes it: crop, `RandomState.choice` with replacement, one pool, numpy's statistics."""
    pools: list[list[Any]] = [[] for _ in range(channels)]
    labels = sorted((folder / "labelsTr").iterdir())
    for path in labels:
        name = path.name.removesuffix(".nii.gz")
        image = np.stack(
            [
                sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "imagesTr" / f"{name}_{c:04}.nii.gz")))
                for c in range(channels)
            ]
        )
        inside = np.argwhere((image != 0).any(axis=0))
        box = tuple(slice(low, high + 1) for low, high in zip(inside.min(0), inside.max(0), strict=True))
        foreground = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[box] > 0
        state = np.random.RandomState(1234)
        for channel in range(channels):
            values = image[channel][box][foreground]
            pools[channel].append(state.choice(values, samples // len(labels), replace=True) if values.size else [])
    found = []
    for parts in pools:
        pool = np.concatenate(parts).astype(np.float64)
        low, median, high = np.percentile(pool, (0.5, 50.0, 99.5))
        found.append(
            {
                "max": pool.max(),
                "mean": pool.mean(),
                "median": median,
                "min": pool.min(),
                "percentile_00_5": low,
                "percentile_99_5": high,
                "std": pool.std(),
            }
        )
    return found


def _statistics(fingerprint: Fingerprint, channel: int = 0) -> dict[str, float]:
    found: dict[str, float] = fingerprint.document()["foreground_intensity_properties_per_channel"][str(channel)]
    return found


@pytest.mark.requirement("ART-02")
@pytest.mark.parametrize("samples", [1000, 3_000_000])
def test_intensities_are_those_of_nnunets_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    folder = write_dataset(tmp_path / "d", channels=2)
    image = np.rint(np.random.default_rng(1).normal(-5, 60, (6, 10, 12))).astype(np.float32) / 2  # -0.0 too
    image[:2] = 0
    for channel in range(2):
        write_array(folder / "imagesTr" / f"case_02_{channel:04}.nii.gz", image)
    monkeypatch.setattr(module, "_SAMPLES", samples)
    monkeypatch.setattr(module, "_BLOCK", 777)
    monkeypatch.setattr(module, "_FEW", 10)
    fingerprint = extract_fingerprint(open_dataset(folder), processes=1)
    for channel, wanted in enumerate(_by_nnunets_rule(folder, samples, 2)):
        assert _statistics(fingerprint, channel) == pytest.approx(wanted, rel=1e-6)
    assert fingerprint.shapes_after_crop[2] == (4, 10, 12)
    assert fingerprint.median_relative_size_after_cropping == 1.0
    assert fingerprint.spacings == ((2.0, 0.75, 0.5),) * 6


@pytest.mark.requirement("ART-02")
@pytest.mark.peer("shared-data")
def test_the_fingerprint_of_the_hippocampus_set_is_nnunets(shared_root: Path) -> None:
    fingerprint = extract_fingerprint(open_dataset(shared_root / "data" / "Dataset004_Hippocampus"), processes=2)
    wanted = json.loads((shared_root / "reference/plans/hippocampus_004/dataset_fingerprint.json").read_text())
    found = fingerprint.document()
    assert _statistics(fingerprint) == pytest.approx(
        wanted["foreground_intensity_properties_per_channel"]["0"], rel=1e-6
    )
    for key in ("spacings", "shapes_after_crop", "median_relative_size_after_cropping"):
        assert found[key] == wanted[key]
    assert found["seggate"]["num_cases"] == 200
    assert len(fingerprint.cases) == 200


@pytest.mark.requirement("ART-02")
@pytest.mark.peer("shared-data")
def test_the_fingerprint_of_twenty_cases_is_nnunets(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "Dataset004_Hippocampus"
    folder = tmp_path / "Dataset020_Twenty"
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for label in sorted((source / "labelsTr").iterdir())[::10]:
        shutil.copy(label, folder / "labelsTr")
        shutil.copy(source / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz"), folder / "imagesTr")
    shutil.copy(source / "dataset.json", folder)
    dataset = open_dataset(folder)
    assert len(dataset.cases) == 20
    assert _statistics(extract_fingerprint(dataset, processes=1)) == pytest.approx(TWENTY, rel=1e-6)


@pytest.mark.requirement("ART-02")
def test_the_file_holds_nnunets_keys_and_the_statistics_beside_them(tmp_path: Path) -> None:
    fingerprint = Fingerprint(
        spacings=((3.0, 1.0, 0.5), (1.0, 1.0, 0.5)),
        shapes_after_crop=((10, 20, 30), (20, 20, 32)),
        intensities=(
            module.IntensityStatistics(
                max=9.0, mean=5.0, median=4.5, min=1.0, percentile_00_5=1.5, percentile_99_5=8.5, std=2.0
            ),
        ),
        median_relative_size_after_cropping=0.8,
        cases=(CaseSummary(name="a", foreground_ml=1.5, labels=(1, 2)),),
    )
    fingerprint.write(tmp_path / "out" / "dataset_fingerprint.json")
    content = json.loads((tmp_path / "out" / "dataset_fingerprint.json").read_text())
    assert set(content) == {
        "foreground_intensity_properties_per_channel",
        "median_relative_size_after_cropping",
        "shapes_after_crop",
        "spacings",
        "seggate",
    }
    ours = content["seggate"]
    assert ours["num_cases"] == 2
    assert ours["spacing_mm"]["z"] == {"max": 3.0, "mean": 2.0, "median": 2.0, "min": 1.0}
    assert ours["shape_after_crop"]["x"] == {"max": 32.0, "mean": 31.0, "median": 31.0, "min": 30.0}
    assert ours["cases"] == {"a": {"foreground_ml": 1.5, "labels": [1, 2]}}
    assert read_fingerprint(tmp_path / "out" / "dataset_fingerprint.json") == fingerprint


def test_cases_are_summed_up_for_splits_without_the_ignore_label(tmp_path: Path) -> None:
    labels = {"background": 0, "first": 1, "second": 2, "ignore": 3}
    folder = write_dataset(tmp_path / "d", cases=1, labels=labels)
    array = np.zeros((6, 10, 12), np.uint8)
    array[0, 0, :4] = (2, 2, 3, 3)
    write_array(folder / "labelsTr" / "case_00.nii.gz", array)
    fingerprint = extract_fingerprint(open_dataset(folder), processes=1)
    assert fingerprint.cases[0].labels == (2,)
    assert fingerprint.cases[0].foreground_ml == pytest.approx(2 * 2.0 * 0.75 * 0.5 / 1000)


def test_an_empty_case_adds_no_intensity_and_none_but_empty_ones_is_an_error(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=2)
    write_array(folder / "labelsTr" / "case_00.nii.gz", np.zeros((6, 10, 12), np.uint8))
    dataset = open_dataset(folder)
    fingerprint = extract_fingerprint(dataset, processes=1)
    assert _statistics(fingerprint) == pytest.approx(_by_nnunets_rule(folder, 10**8, 1)[0], rel=1e-6)
    write_array(folder / "labelsTr" / "case_01.nii.gz", np.zeros((6, 10, 12), np.uint8))
    with pytest.raises(DatasetInvalid, match="nothing to learn"):
        extract_fingerprint(dataset, processes=1)


def test_a_case_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=3)
    (folder / "labelsTr" / "case_01.nii.gz").unlink()
    with pytest.raises(InputRejected, match=r"case_01\.nii\.gz"):
        extract_fingerprint(open_dataset(folder), processes=2)


def test_workers_and_one_process_give_the_same(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "d", channels=2))
    assert extract_fingerprint(dataset, processes=3) == extract_fingerprint(dataset, processes=1)


def _peak(dataset: RawDataset) -> int:
    tracemalloc.start()
    try:
        extract_fingerprint(dataset, processes=1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_stays_far_below_the_values_that_are_drawn(tmp_path: Path) -> None:
    """nnU-Net holds 400 MB a channel, several times."""
    dataset = open_dataset(write_dataset(tmp_path / "d", cases=6, channels=2, shape=(16, 32, 32)))
    assert _peak(dataset) < 60_000_000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"spacings": [[1.0, 1.0]]}, r"spacings\[0\]"),
        ({"spacings": [[1.0, 1.0, 0.0]]}, r"spacings\[0\]\[2\]"),
        ({"shapes_after_crop": [[1, 2, 3]] * 2}, "1 cases, shapes_after_crop has 2"),
        ({"foreground_intensity_properties_per_channel": {"1": {}}}, "0 is missing"),
        ({"foreground_intensity_properties_per_channel": {"0": {"max": "x"}}}, "max"),
        ({"median_relative_size_after_cropping": 2}, "median_relative_size_after_cropping"),
    ],
)
def test_a_wrong_fingerprint_file_is_refused_with_its_key(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    content = {
        "spacings": [[1.0, 1.0, 1.0]],
        "shapes_after_crop": [[10, 10, 10]],
        "foreground_intensity_properties_per_channel": {"0": TWENTY},
        "median_relative_size_after_cropping": 1.0,
    }
    path = tmp_path / "dataset_fingerprint.json"
    path.write_text(json.dumps(content))
    assert read_fingerprint(path).intensities[0].median == TWENTY["median"]
    path.write_text(json.dumps(content | change))
    with pytest.raises(DatasetInvalid, match=named):
        read_fingerprint(path)
