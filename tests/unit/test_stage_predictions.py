"""What a stage hands to the next: which grid, which fold's word counts, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import DatasetInvalid
from engine.labels import LabelManager
from engine.logit_source import NetworkLogits
from engine.plans import read_plans
from engine.preprocessing import CroppedImage
from engine.stage_predictions import (
    NextStage,
    PreviousStage,
    is_predicted,
    predicted_by,
    stage_digest,
    stage_folder,
)
from tests.support.peers import require_peer
from tests.support.tiny_models import configuration_json, plans_json

LABELS = LabelManager.from_dataset_json({"labels": {"background": 0, "first": 1, "second": 2}})
REGIONS = LabelManager.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
)
SHAPE = (6, 8, 10)


PLANNED = read_plans(
    plans_json(
        {
            "3d_lowres": configuration_json((4, 4, 4), (2, 2, 2)),
            "3d_cascade_fullres": configuration_json((4, 8, 8), (1, 1, 1), previous_stage="3d_lowres"),
        }
    )
).configurations


def _stage(root: Path, fold: str = "0", labels: LabelManager = LABELS) -> NextStage:
    return NextStage(
        folder=stage_folder(root / "model", "3d_cascade_fullres"),
        configuration=PLANNED["3d_cascade_fullres"],
        labels=labels,
        fold=fold,
    )


def _cropped() -> CroppedImage:
    """Twice as fine as the first stage's grid, in a crop that does not begin at 0."""
    z, y, x = SHAPE
    return CroppedImage(
        image=np.ones((1, *SHAPE), dtype=np.float32),
        box=(slice(1, 1 + z), slice(2, 2 + y), slice(0, x)),
        full_shape=(z + 3, y + 3, x),
        spacing_mm=(1.0, 1.0, 1.0),
    )


def _output(labels: NDArray[Any], heads: int = 3) -> NetworkLogits:
    """Logits on the first stage's grid that are certain of these labels."""
    logits = np.stack([(labels == value) * 8.0 - 4.0 for value in range(heads)]).astype(np.float16)
    rule = PLANNED["3d_lowres"].resampling_probabilities
    return NetworkLogits(logits=logits, spacing_mm=(2.0, 2.0, 2.0), rule=rule)


def _coarse() -> NDArray[np.uint8]:
    """Slabs, whose borders stay where they are when each voxel becomes 2 x 2 x 2."""
    labels = np.zeros((3, 4, 5), dtype=np.uint8)
    labels[..., 1:3] = 1
    labels[..., 4] = 2
    return labels


def _previous(stage: NextStage, *names: str) -> PreviousStage:
    return PreviousStage(folder=stage.folder, digest=stage_digest(stage.folder, names))


@pytest.fixture(params=["blosc2", "numpy"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "blosc2":
        require_peer("blosc2")
    else:
        monkeypatch.setattr("engine.stage_predictions._blosc2", lambda: None)
    return str(request.param)


def test_a_label_map_lies_on_the_next_stages_grid_over_the_crop(tmp_path: Path, kind: str) -> None:
    stage = _stage(tmp_path)
    stage.write("case_1", _output(_coarse()), _cropped())
    stored = _previous(stage, "case_1").open("case_1", SHAPE)
    assert stored.shape == (1, *SHAPE)
    assert stored.dtype == np.uint8
    found = _previous(stage, "case_1").labels("case_1", SHAPE)
    assert np.array_equal(found, _coarse().repeat(2, 0).repeat(2, 1).repeat(2, 2))
    part = stored[slice(None), slice(2, 4), slice(1, 7), slice(3, 9)]
    assert np.array_equal(part[0], found[2:4, 1:7, 3:9])
    suffix = {"blosc2": ".b2nd", "numpy": ".npy"}[kind]
    assert {path.name for path in stage.folder.iterdir()} == {f"case_1{suffix}", "case_1.json"}
    assert stage.folder == tmp_path / "model" / "predicted_next_stage" / "3d_cascade_fullres"


def test_regions_are_written_as_the_labels_that_they_are_written_as(tmp_path: Path) -> None:
    whole = _coarse() > 0
    logits = np.stack([whole, _coarse() == 2]) * 8.0 - 4.0
    output = replace(_output(_coarse()), logits=logits.astype(np.float16))
    stage = _stage(tmp_path, labels=REGIONS)
    stage.write("case_1", output, _cropped())
    found = _previous(stage, "case_1").labels("case_1", SHAPE)
    assert np.array_equal(found, _coarse().repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_what_nnunet_wrote_needs_no_description(tmp_path: Path) -> None:
    require_peer("blosc2")
    import blosc2

    stage = _stage(tmp_path)
    stage.folder.mkdir(parents=True)
    labels = np.arange(np.prod(SHAPE), dtype=np.uint8).reshape(SHAPE) % 3
    blosc2.asarray(labels, urlpath=str(stage.folder / "case_1.b2nd"), chunks=(4, 8, 8), blocks=(2, 4, 4))
    assert is_predicted(stage.folder, "case_1")
    assert predicted_by(stage.folder, "case_1") is None
    assert np.array_equal(_previous(stage, "case_1").labels("case_1", SHAPE), labels)
    assert not stage.lacks("case_1")
    # Written over one of ours, whose description does not hold for it.
    _stage(tmp_path, "all").write("case_2", _output(_coarse()), _cropped())
    assert stage.lacks("case_2")
    shutil.copy(stage.folder / "case_1.b2nd", stage.folder / "case_2.b2nd")
    assert predicted_by(stage.folder, "case_2") is None
    assert not stage.lacks("case_2")


def test_the_fold_that_knows_every_case_never_replaces_another_folds_prediction(tmp_path: Path) -> None:
    """In any order of the two."""
    mine, everybodys = _stage(tmp_path, "3"), _stage(tmp_path, "all")
    other = np.zeros_like(_coarse())
    everybodys.write("case_1", _output(other), _cropped())
    assert predicted_by(mine.folder, "case_1") == "all"
    assert mine.lacks("case_1")
    assert not everybodys.lacks("case_1")
    mine.write("case_1", _output(_coarse()), _cropped())
    assert predicted_by(mine.folder, "case_1") == "3"
    everybodys.write("case_1", _output(other), _cropped())
    assert predicted_by(mine.folder, "case_1") == "3"
    assert _previous(mine, "case_1").labels("case_1", SHAPE).any()
    # Its own it makes anew.
    everybodys.write("case_2", _output(other), _cropped())
    everybodys.write("case_2", _output(_coarse()), _cropped())
    assert _previous(mine, "case_2").labels("case_2", SHAPE).any()


def test_the_digest_is_of_the_labels_of_the_cases_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_peer("blosc2")
    stage, names = _stage(tmp_path), ("case_1", "case_2")
    for name in names:
        stage.write(name, _output(_coarse()), _cropped())
    before = stage_digest(stage.folder, names)
    stage.write("case_3", _output(_coarse()), _cropped())
    stage.write("case_2", _output(_coarse()), _cropped())
    assert stage_digest(stage.folder, names) == before
    assert stage_digest(stage.folder, names[:1]) != before
    monkeypatch.setattr("engine.stage_predictions._blosc2", lambda: None)
    stage.write("case_2", _output(_coarse()), _cropped())
    assert not (stage.folder / "case_2.b2nd").exists()
    assert stage_digest(stage.folder, names) == before
    stage.write("case_2", _output(_coarse()[..., ::-1]), _cropped())
    assert stage_digest(stage.folder, names) != before


def test_a_label_map_that_nnunet_wrote_counts_with_its_bytes(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    stage.folder.mkdir(parents=True)
    np.save(stage.folder / "case_1.npy", np.zeros(SHAPE, dtype=np.uint8))
    before = stage_digest(stage.folder, ["case_1"])
    np.save(stage.folder / "case_1.npy", np.ones(SHAPE, dtype=np.uint8))
    assert stage_digest(stage.folder, ["case_1"]) != before


def test_what_is_absent_damaged_or_of_another_size_is_named(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    stage.write("case_1", _output(_coarse()), _cropped())
    previous = _previous(stage, "case_1")
    with pytest.raises(DatasetInvalid, match="model/predicted_next_stage/3d_cascade_fullres: case_2: there is no pred"):
        previous.open("case_2", SHAPE)
    with pytest.raises(DatasetInvalid, match=r"case_1: .* has \(6, 8, 10\) voxels, the case \(6, 8, 11\)"):
        previous.open("case_1", (6, 8, 11))
    for path in stage.folder.glob("case_1.*"):
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(DatasetInvalid, match=r"case_1: .* is not readable; remove case_1\.\w+ there and train") as told:
        previous.open("case_1", SHAPE)
    assert str(tmp_path) not in str(told.value)
    with pytest.raises(DatasetInvalid, match=r"case_1\.json"):
        predicted_by(stage.folder, "case_1")
    (stage.folder / "case_1.json").write_text(json.dumps({"bytes": len(b"nothing of the kind")}))
    with pytest.raises(DatasetInvalid, match="fold"):
        predicted_by(stage.folder, "case_1")


def test_the_disk_that_is_needed_is_that_of_the_finer_grid_and_nothing_for_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = _stage(tmp_path)
    monkeypatch.setattr("engine.stage_predictions._blosc2", lambda: None)
    assert stage.needed_bytes("case_1", 60, PLANNED["3d_lowres"]) == 60 * 8
    stage.write("case_1", _output(_coarse()), _cropped())
    assert stage.needed_bytes("case_1", 60, PLANNED["3d_lowres"]) == 0
