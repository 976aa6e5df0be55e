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
