"""The synthetic study: the same bytes every time, a legal object each, and one the demo model is content with."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from engine.bundle import load_bundle
from engine.predictor import Predictor
from gateway.demo.story import model_folder
from gateway.demo.synthetic_study import hippocampus_crop, write_synthetic_study
from gateway.results.quality import Verdict, judge
from gateway.results.series import read_series
from tests.support.result_readers import iod_errors

# Of all files in the order of their names. It changes when the study does: then look at the demo's result again.
DIGEST = "d0223f7886ed6ced716ee3c05ed7863f2924b55145213158f2f412630c4ac6bf"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_synthetic_study(tmp_path_factory.mktemp("study"))


def digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in sorted(files))).hexdigest()


def test_the_same_bytes_every_time(study: list[Path], tmp_path: Path) -> None:
    again = write_synthetic_study(tmp_path)
    assert [f.name for f in again] == [f.name for f in study]
    assert digest(again) == digest(study) == DIGEST


def test_another_instance_is_another_study_with_the_same_pixels(study: list[Path], tmp_path: Path) -> None:
    other = write_synthetic_study(tmp_path, instance="2")
    first, second = ([pydicom.dcmread(f) for f in files] for files in (study, other))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        assert not {d[keyword].value for d in first} & {d[keyword].value for d in second}
    assert all(a.PixelData == b.PixelData for a, b in zip(first, second, strict=True))


def test_one_series_is_the_crop_and_the_others_are_sisters(study: list[Path]) -> None:
    datasets = [pydicom.dcmread(f, stop_before_pixels=True) for f in study]
    assert Counter(d.SeriesDescription for d in datasets) == {
        "T1 axial": 12,
        "T2 axial": 12,
        "FLAIR axial": 12,
        "HippoCrop": 36,
    }
    assert len({d.SOPInstanceUID for d in datasets}) == len(datasets)
    assert len({d.StudyInstanceUID for d in datasets}) == 1
    assert {tuple(d.PixelSpacing) for d in datasets if d.SeriesDescription == "HippoCrop"} == {(1, 1)}


def test_pixels_are_what_was_drawn(study: list[Path]) -> None:
    files = [f for f in study if f.name.startswith("series4")]
    stored = np.stack([pydicom.dcmread(f).pixel_array for f in files])
    assert np.array_equal(stored, np.rint(hippocampus_crop()))
    assert stored.max() < 1 << 12


@pytest.mark.peer("dciodvfy")
def test_every_object_is_legal(study: list[Path]) -> None:
    for file in study[::6]:
        assert iod_errors(file) == [], file.name


def test_the_demo_model_finds_both_structures_and_only_their_certainty_is_doubted(study: list[Path]) -> None:
    """What the demo's result rests on, without the gateway around it."""
    (part,) = read_series([f for f in study if f.name.startswith("series4")])
    assert part.volume is not None
    with Predictor(load_bundle(model_folder()), device="cpu") as predictor:
        prediction = predictor.predict(part.volume)
        bundle = predictor.bundle
    measured = [
        {
            "name": s.name,
            "voxels": s.voxels,
            "volume_ml": s.volume_ml,
            "confidence": s.confidence,
            "components": s.components,
            "touches_border": list(s.touches_border),
            "fold_dice": s.fold_dice,
            "mirror_dice": s.mirror_dice,
            "centroid_lps_mm": None,  # only for pairs, and this model has none
        }
        for s in prediction.segments
    ]
    verdict, checks = judge(measured, mean_confidence=prediction.mean_confidence, bundle=bundle, doubts=())
    # An invented image is unlike the cases that the networks and their calibration know, and that is what is found.
    assert verdict is Verdict.REVIEW, checks
    assert {c.name for c in checks if c.verdict is not Verdict.PASS} == {"calibrated-range", "fold-agreement"}
    assert {c.name for c in checks} >= {"empty", "volume", "border", "components", "confidence", "fold-agreement"}
