"""Which trained networks and bundles know a case, and how: asked when it turns out that the case should not be used.

A fold's training.json names its cases. A fold that nnU-Net trained has no such file; for it the planned dataset's
splits_final.json answers, if it still names the case. A bundle in <results>/<dataset>/bundles has a digest of each
fold's training cases in its provenance.json: whoever has lists of cases can tell which of them it was. Of folds without
one (nnU-Net's) its plans, configurations and folds say which those beside it are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import DatasetInvalid
from engine.experiment import ALL, FINAL, PLANS_JSON, REQUEST
from engine.json_reader import Reader, read_json
from engine.manifest import MANIFEST
from engine.provenance import PROVENANCE_JSON, FoldTraining, cases_digest, read_provenance
from engine.splits import Split

Role = Literal["train", "hold-out", "validation", "unknown"]
"""train: the weights learnt from the case. hold-out: it chose the checkpoint. validation: it is part of the figures and
of the choice of model and post-processing. unknown: nothing says."""

BUNDLES = "bundles"
_MOST_CASES = 10**7
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
    """A bundle with networks that were trained on the case, as `folds` (model/fold_0) says; where `untraced` is a
    reason, nobody can say it of others, or of the bundle at all."""

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
        elif (folder / FINAL).exists() or any(folder.glob("checkpoint_*.pth")):
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
                    finished=(folder / FINAL).exists(),
                )
            )
    return tuple(found)


def bundles_trained_on(
    results: Path, case: str, folds: Sequence[FoldExposure], *, splits: Sequence[Split] = ()
) -> tuple[BundleExposure, ...]:
    """Bundles of one dataset's result folder with networks that were trained on the case, sorted; those of which nobody
    can tell too. `folds` are those that know the case, `splits` as for `folds_that_know`."""
    lists = [split.train for split in splits]
    lists.append(tuple(dict.fromkeys(name for split in splits for name in (*split.train, *split.val))))
    for path in results.glob(f"*__*__*/fold_*/{REQUEST}"):
        request = Reader(read_json(path, error=DatasetInvalid), where=REQUEST, error=DatasetInvalid)
        lists.append(request.texts("train", lengths=(0, _MOST_CASES), default=()))
    known = {cases_digest(names): case in names for names in lists if names}
    there = sorted(path.parent for path in (results / BUNDLES).glob(f"*/{MANIFEST}"))
    return tuple(found for folder in there if (found := _bundle(folder, folds, known)) is not None)


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


def _bundle(folder: Path, folds: Sequence[FoldExposure], known: Mapping[str, bool]) -> BundleExposure | None:
    """`known`: of the digest of a list of training cases, whether the case is one of them."""
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
        trained = _trainings(folder)
    except DatasetInvalid as error:
        return BundleExposure(folder=folder, name=name, semver=semver, folds=(), untraced=str(error))
    seen, nobody_knows = [], []
    for configuration, fold in sorted(networks):
        training = trained.get((configuration, fold))
        if training is not None and training.training_cases_digest is not None:
            trained_on = known.get(training.training_cases_digest)
            if trained_on is None:
                nobody_knows.append(f"{configuration}/fold_{fold} ({training.training_cases} cases)")
            elif trained_on:
                seen.append(f"{training.trainer}__{plans_name}__{configuration}/fold_{fold}")
            continue
        for exposure in folds:
            its_trainer, its_plans, its_configuration = exposure.model.split("__", 2)
            ours = its_plans == plans_name and (its_configuration, exposure.fold) == (configuration, fold)
            if ours and exposure.trained_on and (trainer is None or trainer[1] == its_trainer):
                seen.append(f"{exposure.model}/fold_{exposure.fold}")
    untraced = (
        f"no list of cases that is here is the one that it was trained on: {', '.join(nobody_knows)}"
        if nobody_knows
        else None
    )
    if not seen and untraced is None:
        return None
    return BundleExposure(folder=folder, name=name, semver=semver, folds=tuple(seen), untraced=untraced)


def _trainings(folder: Path) -> dict[tuple[str, str], FoldTraining]:
    """Of a bundle's networks, by configuration and fold; nothing where it has no provenance."""
    path = folder / PROVENANCE_JSON
    if not path.exists():
        return {}
    provenance = read_provenance(read_json(path, error=DatasetInvalid), error=DatasetInvalid)
    return {(training.configuration, training.fold): training for training in provenance.training}
