"""Which trained networks and bundles know a case, and how: asked when it turns out that the case should not be used.

A fold's training.json names its cases. A fold that nnU-Net trained has no such file; for it the planned dataset's
splits_final.json answers, if it still names the case. A bundle in <results>/<dataset>/bundles is made of folds beside
it: its plans, configurations and folds say of which.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import DatasetInvalid
from engine.experiment import ALL, PLANS_JSON, REQUEST
from engine.json_reader import Reader, read_json
from engine.manifest import MANIFEST
from engine.splits import Split

Role = Literal["train", "hold-out", "validation", "unknown"]
"""train: the weights learnt from the case. hold-out: it chose the checkpoint. validation: it is part of the figures and
of the choice of model and post-processing. unknown: nothing says."""

BUNDLES = "bundles"
_MOST_CASES = 10**7
_FINAL = "checkpoint_final.pth"
_TRAINER = re.compile(r"\((nnUNetTrainer\w*)[:,]")


@dataclass(frozen=True, kw_only=True)
class FoldExposure:
    """A fold that knows the case. `model` is the result folder's name, `roles` are all that apply (the fold `all`
    trains and validates on every case), `finished` says whether it was trained to its end."""

    folder: Path
    model: str
    fold: str
    roles: tuple[Role, ...]
    finished: bool

    @property
    def trained_on(self) -> bool:
        return "train" in self.roles


@dataclass(frozen=True, kw_only=True)
class BundleExposure:
    """A bundle with networks that were trained on the case, as `folds` (model/fold_0) says; or, where `untraced` is a
    reason, one of which nobody can say."""

    folder: Path
    name: str
    semver: str
    folds: tuple[str, ...]
    untraced: str | None = None


def folds_that_know(results: Path, case: str, *, splits: Sequence[Split] = ()) -> tuple[FoldExposure, ...]:
    """Of one dataset's result folder, sorted. `splits`: those of the planned dataset, for folds that nnU-Net trained.

    Raises DatasetInvalid for a training.json that cannot be read.
    """
    found = []
    for folder in sorted(path for path in results.glob("*__*__*/fold_*") if path.is_dir()):
        fold = folder.name.removeprefix("fold_")
        if (folder / REQUEST).exists():
            roles = _recorded_roles(folder, case)
        elif (folder / _FINAL).exists() or any(folder.glob("checkpoint_*.pth")):
            roles = _split_roles(fold, case, splits)
        else:
            roles = ()
        if roles:
            found.append(
                FoldExposure(
                    folder=folder,
                    model=folder.parent.name,
                    fold=fold,
                    roles=roles,
                    finished=(folder / _FINAL).exists(),
                )
            )
    return tuple(found)


def bundles_trained_on(results: Path, folds: Sequence[FoldExposure]) -> tuple[BundleExposure, ...]:
    """Bundles of one dataset's result folder with networks of these folds, sorted; those that cannot be traced too."""
    there = sorted(path.parent for path in (results / BUNDLES).glob(f"*/{MANIFEST}"))
    return tuple(found for folder in there if (found := _bundle(folder, folds)) is not None)


def _recorded_roles(folder: Path, case: str) -> tuple[Role, ...]:
    where = f"{folder.parent.name}/{folder.name}/{REQUEST}"
    try:
        document = read_json(folder / REQUEST, error=DatasetInvalid)
    except DatasetInvalid as error:
        raise DatasetInvalid(f"{where}: {error}") from error
    reader = Reader(document, where=where, error=DatasetInvalid)
    keys: tuple[tuple[str, Role], ...] = (("train", "train"), ("hold_out", "hold-out"), ("val", "validation"))
    return tuple(role for key, role in keys if case in reader.texts(key, lengths=(0, _MOST_CASES), default=()))


def _split_roles(fold: str, case: str, splits: Sequence[Split]) -> tuple[Role, ...]:
    if fold == ALL:
        return "train", "validation"
    split = splits[int(fold)] if fold.isdecimal() and int(fold) < len(splits) else None
    if split is None or case not in {*split.train, *split.val}:
        return ("unknown",)
    return ("train",) if case in split.train else ("validation",)


def _bundle(folder: Path, folds: Sequence[FoldExposure]) -> BundleExposure | None:
    name, semver = folder.name, ""
    try:
        manifest = Reader(read_json(folder / MANIFEST, error=DatasetInvalid), where=MANIFEST, error=DatasetInvalid)
        name, semver = manifest.text("name"), manifest.text("semver")
        plans = Reader(read_json(folder / PLANS_JSON, error=DatasetInvalid), where=PLANS_JSON, error=DatasetInvalid)
        plans_name = plans.text("plans_name")
        networks = {
            (configuration.text("name"), fold.text("fold"))
            for configuration in manifest.children("configurations", lengths=(1, 100))
            for fold in configuration.children("folds", lengths=(1, 1000))
        }
        trainer = _TRAINER.search(manifest.text("origin", "", empty=True))
    except DatasetInvalid as error:
        return BundleExposure(folder=folder, name=name, semver=semver, folds=(), untraced=str(error))
    seen = []
    for exposure in folds:
        its_trainer, its_plans, its_configuration = exposure.model.split("__", 2)
        ours = its_plans == plans_name and (its_configuration, exposure.fold) in networks
        if ours and exposure.trained_on and (trainer is None or trainer[1] == its_trainer):
            seen.append(f"{exposure.model}/fold_{exposure.fold}")
    return BundleExposure(folder=folder, name=name, semver=semver, folds=tuple(seen)) if seen else None
