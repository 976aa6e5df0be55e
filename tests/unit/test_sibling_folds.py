"""engine.sibling_folds: folds that are joined are mirrored along the same axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import DatasetInvalid, TrainingRefused
from engine.sibling_folds import refuse_mixed_mirroring, refuse_other_mirroring


def _sibling(model: Path, fold: str, **request: Any) -> None:
    (model / f"fold_{fold}").mkdir(parents=True)
    (model / f"fold_{fold}" / "training.json").write_text(json.dumps(request))


@pytest.mark.parametrize(
    ("axes", "inference", "named"),
    [([0, 1, 2], [0, 1, 2], r"mirror_axes \[0, 1, 2\].*\[0, 1\]"), ([0, 1], [0], r"inference_mirror_axes \[0\]")],
)
def test_a_fold_is_refused_whose_finished_sibling_was_mirrored_otherwise(
    tmp_path: Path, axes: list[int], inference: list[int], named: str
) -> None:
    _sibling(tmp_path, "0", mirror_axes=axes, inference_mirror_axes=inference, result={})
    with pytest.raises(TrainingRefused, match=f"fold_0.*{named}"):
        refuse_other_mirroring(tmp_path / "fold_1", (0, 1), (0, 1))


def test_siblings_that_are_alike_unfinished_or_silent_do_not_matter(tmp_path: Path) -> None:
    _sibling(tmp_path, "0", mirror_axes=[0, 1], inference_mirror_axes=[0, 1], result={})
    _sibling(tmp_path, "1", mirror_axes=[0, 1, 2], inference_mirror_axes=[0, 1, 2])
    _sibling(tmp_path, "2", result={})
    _sibling(tmp_path, "3", mirror_axes=[0, 1, 2], inference_mirror_axes=[0, 1, 2], result={})
    (tmp_path / "fold_4").mkdir()
    refuse_other_mirroring(tmp_path / "fold_3", (0, 1), (0, 1))


def test_folds_that_were_mirrored_along_different_axes_are_not_joined(tmp_path: Path) -> None:
    """Trained at the same time, neither found the other finished."""
    for fold, axes in (("0", [0, 1, 2]), ("1", [0, 1]), ("2", [0, 1, 2])):
        folder = tmp_path / "model" / f"fold_{fold}"
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(json.dumps({"mirror_axes": axes, "inference_mirror_axes": axes}))
    (tmp_path / "model" / "fold_3").mkdir()  # nnU-Net's
    with pytest.raises(DatasetInvalid, match=r"model: fold 0 has .*mirror_axes \[0, 1, 2\], fold 1 has \[0, 1\]"):
        refuse_mixed_mirroring(tmp_path / "model", ("0", "1"))
    refuse_mixed_mirroring(tmp_path / "model", ("0", "2", "3"))
