"""What the folds of one model must have in common, as their training.json says it.

A model predicts with all its folds at once, and mirrors each image along the same axes for all of them: a fold that was
mirrored from side to side does not know left from right, and would be joined with folds that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import DatasetInvalid, TrainingRefused
from engine.experiment import REQUEST, is_finished
from engine.json_reader import read_json

_KEYS = ("mirror_axes", "inference_mirror_axes")


def refuse_mixed_mirroring(model_folder: Path, folds: Sequence[str]) -> None:
    """Of folds that are to be joined, which may have been trained at the same time. Raises DatasetInvalid, naming two
    folds, where they were mirrored along different axes. A fold without training.json (nnU-Net's) is passed over."""
    first: tuple[str, dict[str, object]] | None = None
    for fold in folds:
        path = model_folder / f"fold_{fold}" / REQUEST
        if not path.exists():
            continue
        request = read_json(path, error=DatasetInvalid)
        own = {key: request[key] for key in _KEYS if key in request}
        if first is None:
            first = fold, own
        for key in _KEYS:
            if key in own and key in first[1] and own[key] != first[1][key]:
                raise DatasetInvalid(
                    f"{model_folder.name}: fold {first[0]} has {key} {first[1][key]}, fold {fold} has {own[key]}: "
                    "folds that are joined need the same; train one of them again with the other's --sides and --mirror"
                )


def refuse_other_mirroring(folder: Path, axes: Sequence[int], inference_axes: Sequence[int]) -> None:
    """`folder` is the fold's own, `axes` are mirrored in its training and `inference_axes` when it predicts. Raises
    TrainingRefused, naming the fold, when one beside it is finished and was trained with others."""
    for sibling in sorted(folder.parent.glob("fold_*")):
        if sibling == folder or not is_finished(sibling):
            continue
        request = read_json(sibling / REQUEST, error=DatasetInvalid)
        for key, own in zip(_KEYS, (axes, inference_axes), strict=True):
            found = request.get(key)
            if found is not None and found != list(own):
                raise TrainingRefused(
                    f"{sibling.name} of {folder.parent.name} is finished and has {key} {found}, {folder.name} would "
                    f"have {list(own)}: folds that are joined need the same. Use its --sides and --mirror, or train "
                    "all folds into another --results"
                )
