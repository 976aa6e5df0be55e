"""A model that was trained here or by nnU-Net, as a fine-tuning finds it: its folder, plans and folds (torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import load_checkpoint_file
from engine.dataset import DATASET_JSON, DatasetJson, read_dataset_json
from engine.errors import DatasetInvalid, ImportRefused
from engine.experiment import FINAL, PLANS_JSON, REQUEST
from engine.json_reader import Reader, read_json
from engine.plans import Plans, read_plans
from engine.splits import Split
from engine.starting_weights import StartingWeights
from engine.training_checkpoint import weights_digest

_FOLD = re.compile(r"fold_(\d{1,3}|all)")
_NAMES = (0, 10**7)


@dataclass(frozen=True, kw_only=True)
class TrainedFold:
    """`split` has a hold-out among the training cases; None where nobody wrote down which cases the fold was trained on
    (nnU-Net does not). Axes are those of the patch that were mirrored in training, and are in prediction."""

    name: str
    start: StartingWeights
    split: Split | None
    mirror_axes: tuple[int, ...]
    inference_mirror_axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """`folder` is <results>/<dataset>/<trainer>__<plans>__<configuration>; `folds` those with a final checkpoint."""

    folder: Path
    trainer: str
    configuration: str
    plans_json: Mapping[str, Any]
    plans: Plans
    dataset_json: DatasetJson
    folds: tuple[str, ...]

    @property
    def dataset_name(self) -> str:
        return self.folder.resolve().parent.name

    def fold_folder(self, fold: str) -> Path:
        return self.folder / f"fold_{fold}"

    def split(self, fold: str) -> Split | None:
        """As the fold's training.json says. Raises DatasetInvalid."""
        path = self.fold_folder(fold) / REQUEST
        if not path.exists():
            return None
        request = Reader(read_json(path, error=DatasetInvalid), where=REQUEST, error=DatasetInvalid)
        train, held_out, val = (request.texts(key, lengths=_NAMES, default=()) for key in ("train", "hold_out", "val"))
        return Split(train=tuple(sorted({*train, *held_out})), val=tuple(val))

    def fold(self, name: str) -> TrainedFold:
        """Raises DatasetInvalid for a fold that is not there, or was trained with other plans than those beside it;
        ImportRefused for a checkpoint that cannot be read."""
        if name not in self.folds:
            raise DatasetInvalid(f"{self.folder.name}: no fold {name[:20]!r}; there are {', '.join(self.folds)}")
        path = self.fold_folder(name) / FINAL
        document, checkpoint = load_checkpoint_file(path)
        self._check_plans(name, document)
        axes = checkpoint.mirror_axes
        request = self.fold_folder(name) / REQUEST
        if request.exists():
            noted = Reader(read_json(request, error=DatasetInvalid), where=REQUEST, error=DatasetInvalid)
            axes = noted.integers("mirror_axes", 0, 2, lengths=(0, 3), default=axes)
        return TrainedFold(
            name=name,
            start=StartingWeights(checkpoint=path, digest=weights_digest(checkpoint.weights)),
            split=self.split(name),
            mirror_axes=tuple(axes),
            inference_mirror_axes=checkpoint.mirror_axes,
        )

    def _check_plans(self, fold: str, document: Mapping[str, Any]) -> None:
        arguments = document.get("init_args")
        trained_with = arguments.get("plans") if isinstance(arguments, Mapping) else None
        if trained_with is None:
            return
        then, now = (
            read_plans(plans, configurations=[self.configuration]) for plans in (trained_with, self.plans_json)
        )
        if then != now:
            raise DatasetInvalid(
                f"{self.folder.name}: fold {fold} was trained with other plans than {PLANS_JSON} beside it; put the "
                "old file back"
            )


def open_trained_model(folder: Path) -> TrainedModel:
    """Raises DatasetInvalid where the folder is no model's, is a cascade's or has no trained fold; ImportRefused for
    plans that cannot be read."""
    parts = folder.resolve().name.split("__")
    if len(parts) != 3 or not all(parts) or not folder.is_dir():
        raise DatasetInvalid(
            f"{folder.name}: is no model's folder; it has the name TRAINER__PLANS__CONFIGURATION, and fold_0 and so on "
            "in it"
        )
    trainer, plans_name, configuration = parts
    try:
        document = read_json(folder / PLANS_JSON, error=ImportRefused)
        plans = read_plans(document)
    except ImportRefused as error:
        raise ImportRefused(f"{folder.name}: {error}") from error
    if plans.plans_name != plans_name or configuration not in plans.configurations:
        raise DatasetInvalid(
            f"{folder.name}: {PLANS_JSON} is {plans.plans_name}, with {', '.join(plans.configurations)}; the folder's "
            "name says otherwise"
        )
    if plans.configurations[configuration].previous_stage is not None:
        raise DatasetInvalid(
            f"{folder.name}: a cascade learns from another model's predictions, which new cases do not have: it is not "
            "fine-tuned. Fine-tune 3d_fullres, or train again"
        )
    found = sorted(
        match.group(1)
        for path in folder.iterdir()
        if (match := _FOLD.fullmatch(path.name)) and (path / FINAL).is_file()
    )
    if not found:
        raise DatasetInvalid(f"{folder.name}: no fold has a {FINAL}: there is nothing to fine-tune")
    return TrainedModel(
        folder=folder,
        trainer=trainer,
        configuration=configuration,
        plans_json=document,
        plans=plans,
        dataset_json=read_dataset_json(folder / DATASET_JSON),
        folds=tuple(sorted(found, key=lambda fold: (not fold.isdecimal(), fold.zfill(3)))),
    )
