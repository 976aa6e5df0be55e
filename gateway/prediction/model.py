"""Which model is to predict: a registered name, a bundle, a model of nnU-Net, or nnU-Net's address."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.bundle import Bundle, load_bundle
from engine.errors import BundleInvalid, ImportRefused
from engine.json_reader import read_json
from engine.manifest import MANIFEST
from engine.volume import AS_STORED, check_orientation
from gateway.prediction.conversion_cache import Progress, Tell, cache_folder, converted_result, unpacked_bundle
from gateway.prediction.request import PredictRequest, UsageRefused

_RESULTS = "nnUNet_results"
_NNUNET_FOLDS = ("0", "1", "2", "3", "4")
_FINAL = "checkpoint_final.pth"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}(:\d+\.\d+\.\d+)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenModel:
    """`bundle` as it is to be run, with the options that change the model. `configurations` and `folds` are a part of
    it, None for all. `knows_orientation`: somebody said in which voxel order it was trained. `plans_dir`: the models
    folder that keeps its execution plans, None for a model that is not registered."""

    bundle: Bundle
    plans_json: Mapping[str, Any]
    configurations: tuple[str, ...] | None
    folds: tuple[str, ...] | None
    knows_orientation: bool
    plans_dir: Path | None = None

    @property
    def file_ending(self) -> str:
        return str(self.bundle.dataset_json.get("file_ending", ".nii.gz"))

    def _all_folds(self) -> list[str]:
        return sorted({fold.fold for c in self.bundle.final_configurations for fold in c.folds})

    def identity(self) -> dict[str, Any]:
        """What a result depends on besides its image, as it is written beside the results."""
        return {
            "model": self.bundle.name,
            "version": self.bundle.semver,
            "weights_digest": self.bundle.weights_digest,
            "configuration_digest": self.bundle.configuration_digest,
            "configurations": list(self.configurations or (c.name for c in self.bundle.final_configurations)),
            "folds": list(self.folds or self._all_folds()),
            "step_size": self.bundle.step_size,
            "orientation": self.bundle.contract.orientation,
            "postprocessing": self.bundle.postprocessing is not None,
        }


def choose_model(request: PredictRequest, *, tell: Tell, detail: Tell, progress: Progress) -> ChosenModel:
    """`tell` hears what a person must know, `detail` the rest, `progress` how far a conversion is.

    Raises UsageRefused, and for the model itself ImportRefused, BundleInvalid, ParityFailed, MemoryExceeded, or what
    the registry raises.
    """
    cache = cache_folder(request.cache)
    path = _nnunet_address(request) if request.dataset is not None else Path(str(request.model))
    if request.dataset is None and not path.exists():
        bundle, models_dir = _registered(request)
        return replace(_adapted(bundle, request, part_of_bundle=True), plans_dir=models_dir)
    if (path / MANIFEST).is_file():
        return _adapted(load_bundle(path), request, part_of_bundle=True)
    if path.suffix.casefold() == ".zip":
        from engine.model_archive import bundle_folder

        if bundle_folder(path) is not None:
            return _adapted(unpacked_bundle(path, cache), request, part_of_bundle=True)
    bundle = converted_result(
        path,
        cache,
        configurations=request.configurations or None,
        folds=_folds(path, request, tell),
        checkpoint=request.checkpoint,
        tell=tell,
        detail=detail,
        progress=progress,
    )
    # As nnUNetv2_predict, which leaves it to nnUNetv2_apply_postprocessing.
    return _adapted(bundle, request, part_of_bundle=False)


def _adapted(bundle: Bundle, request: PredictRequest, *, part_of_bundle: bool) -> ChosenModel:
    """`part_of_bundle`: -c and -f choose among what the bundle has; else it was made of what they chose."""
    if part_of_bundle and request.checkpoint is not None:
        raise UsageRefused("-chk: a bundle has no checkpoints; it is for models that nnU-Net trained")
    for name in request.configurations if part_of_bundle else ():
        bundle.configuration(name)
    for fold in request.folds if part_of_bundle else ():
        present = sorted({own.fold for c in bundle.final_configurations for own in c.folds})
        if fold not in present:
            raise BundleInvalid(f"{bundle.name}: has no fold {fold}; it has {', '.join(present)}")
    document = read_json(bundle.root / "plans.json", error=BundleInvalid)
    knows = request.orientation is not None or bundle.contract.orientation != AS_STORED
    if request.orientation is not None:
        try:
            wanted = request.orientation if request.orientation == AS_STORED else check_orientation(request.orientation)
        except ValueError as error:
            raise UsageRefused(f"--orientation: {error}") from error
        bundle = replace(bundle, contract=replace(bundle.contract, orientation=wanted))
    if request.step_size is not None:
        bundle = replace(bundle, step_size=request.step_size)
    applies = part_of_bundle if request.postprocessing is None else request.postprocessing
    if not applies:
        bundle = replace(bundle, postprocessing=None)
    return ChosenModel(
        bundle=bundle,
        plans_json=document,
        configurations=(request.configurations or None) if part_of_bundle else None,
        folds=(request.folds or None) if part_of_bundle else None,
        knows_orientation=knows,
    )


def _registered(request: PredictRequest) -> tuple[Bundle, Path]:
    """And the models folder. NAME: the version that serves; NAME:1.2.0: that one. The registry is slow to open, and
    only opened here."""
    wanted = str(request.model)
    if not _NAME.fullmatch(wanted):
        raise UsageRefused(f"-m {wanted[:200]!r}: there is no such file or folder, and it is no model's name")
    from gateway.logs import keep_off_standard_output
    from gateway.model_shelf import ModelShelf
    from gateway.settings import load_settings
    from gateway.state import open_registry, registry_exists
    from storage.errors import ModelMissing

    keep_off_standard_output()
    settings = load_settings(request.config)
    if not registry_exists(settings):
        raise ModelMissing(
            f"no model {wanted!r}: nothing is registered under {settings.models_dir}, and no such folder is here"
        )
    registry = open_registry(settings)
    name, _, semver = wanted.partition(":")
    bundle = ModelShelf(registry).bundle(registry.get(name, semver) if semver else registry.champion(name))
    return bundle, settings.models_dir


def _nnunet_address(request: PredictRequest) -> Path:
    """nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION, as nnUNetv2_predict finds it."""
    root = os.environ.get(_RESULTS, "")
    if not root:
        raise UsageRefused(
            f"-d: the environment variable {_RESULTS} is not set; set it, or name the model's folder with -m"
        )
    dataset = str(request.dataset)
    if not dataset.startswith("Dataset"):
        if not (dataset.isdecimal() and dataset.isascii()):
            raise UsageRefused(f"-d {dataset[:80]!r}: a dataset's number or its name (Dataset004_Hippocampus)")
        there = sorted(child.name for child in Path(root).glob(f"Dataset{int(dataset):03}_*") if child.is_dir())
        if len(there) != 1:
            what = f"several ({', '.join(there[:5])})" if there else "none"
            raise UsageRefused(f"-d {dataset}: {what} under {_RESULTS}; give the dataset's name")
        dataset = there[0]
    parts = (request.trainer or "nnUNetTrainer", request.plans or "nnUNetPlans", request.configurations[0])
    if any("/" in part for part in (dataset, *parts)):
        raise UsageRefused("-d, -tr, -p and -c are names, not paths")
    folder = Path(root) / dataset / "__".join(parts)
    if not folder.is_dir():
        raise ImportRefused(f"{dataset}/{folder.name}: there is no such folder under {_RESULTS}; check -tr, -p and -c")
    return folder


def _folds(path: Path, request: PredictRequest, tell: Tell) -> Sequence[str] | None:
    """As asked for; else, in one result folder, those of nnU-Net's 0 to 4 that are there. None: what there is."""
    if request.folds:
        return request.folds
    if not (path / "plans.json").is_file() or not path.is_dir():
        return None
    checkpoint = request.checkpoint or _FINAL
    there = [fold for fold in _NNUNET_FOLDS if (path / f"fold_{fold}" / checkpoint).is_file()]
    if there and len(there) < len(_NNUNET_FOLDS):
        tell(f"{path.name}: of the folds 0 to 4 there are {', '.join(there)}; these are used")
    return there or None
