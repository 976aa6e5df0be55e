"""Makes a bundle's sanity cases: phantoms on the plans' grid and images of the site, with the labels that torch gives.

Torch runs the networks as they were trained, float32 on the CPU, all folds with mirroring, through the whole predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.backends import Backend
from engine.bundle import Bundle
from engine.dataset import RawDataset, grid_difference, read_case
from engine.errors import DatasetInvalid, ImportRefused, InputRejected, ParityFailed
from engine.manifest import BundleConfiguration
from engine.nifti import read_label_map, read_nifti
from engine.phantom_planning import plan_phantoms
from engine.predictor import Predictor
from engine.sanity_cases import (
    MAX_CASES,
    MAX_SITE_VOXELS,
    SanityCase,
    SanitySuite,
    image_digest,
    write_case,
)
from engine.sanity_check import CaseAgreement, reference_figures
from engine.sanity_phantom import Phantom, make_phantom
from engine.volume import LabelMap, Volume

_SEEDS = 4

Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteCase:
    """An image of the site, and its reference on the same grid if there is one. Both become part of the bundle; the
    name, which is for messages only, does not."""

    name: str
    volume: Volume
    reference: LabelMap | None


def make_sanity(
    bundle: Bundle,
    networks: Mapping[tuple[str, str], Backend],
    *,
    phantoms: bool,
    site_cases: Sequence[SiteCase],
    progress: Progress,
) -> SanitySuite:
    """Computes and writes the cases below the bundle's root; what is returned still has to be written down there.

    `networks` by configuration and fold. Raises ImportRefused for a site's case that does not fit the model,
    MemoryExceeded.
    """
    if len(site_cases) > MAX_CASES // 2:
        raise ImportRefused(f"{len(site_cases)} sanity cases; at most {MAX_CASES // 2} are kept in a bundle")
    with Predictor(bundle, backends=networks) as predictor:
        planned = plan_phantoms(bundle) if phantoms else ()
        total = len(planned) + len(site_cases)
        cases: list[SanityCase] = []
        for name, phantom in planned:
            progress(len(cases) / total, f"sanity case {name}, torch")
            cases.append(_generated(predictor, name, phantom))
        for number, given in enumerate(site_cases, start=1):
            progress(len(cases) / total, f"sanity case site-{number}, torch")
            cases.append(_given(predictor, f"site-{number}", given))
        version = next(iter(networks.values())).version
    return SanitySuite(computed_by=f"torch {version}, float32 on the CPU", cases=tuple(cases))


def refuse_disagreement(found: Sequence[CaseAgreement], what: str) -> None:
    """Raises ParityFailed with the figures of every case that is beyond the limits of engine/sanity_check.py."""
    faults = [f"{case.name}: {fault}" for case in found for fault in case.faults]
    if faults:
        raise ParityFailed(f"{what} differ from torch on the sanity cases: {'; '.join(faults[:10])}")


def _generated(predictor: Predictor, name: str, phantom: Phantom) -> SanityCase:
    """With the first of a few seeds in which the model finds all of its labels, or else most of them: a label map
    without a label says nothing about it."""
    bundle = predictor.bundle
    first = bundle.final_configurations[0]
    best, most = phantom, -1
    for seed in range(_SEEDS):
        candidate = replace(phantom, seed=seed)
        quick = predictor.predict(
            make_phantom(candidate), folds=_one_fold(bundle, first), configurations=[first.name], mirroring=False
        )
        present = sum(1 for segment in quick.segments if segment.voxels)
        if present > most:
            best, most = candidate, present
        if most == len(quick.segments):
            break
    volume = make_phantom(best)
    prediction = predictor.predict(volume)
    case = SanityCase(
        name=name,
        phantom=best,
        image_sha256=image_digest(volume),
        geometry=None,
        voxels={segment.name: segment.voxels for segment in prediction.segments},
        dice=None,
    )
    write_case(bundle.root, case, prediction.labels.array, image=None, reference=None)
    return case


def _given(predictor: Predictor, name: str, given: SiteCase) -> SanityCase:
    bundle, manager = predictor.bundle, predictor.bundle.label_manager
    if int(np.prod(given.volume.geometry.shape)) > MAX_SITE_VOXELS:
        raise ImportRefused(f"{given.name}: at most {MAX_SITE_VOXELS} voxels are kept as a sanity case")
    dice = None
    try:
        prediction = predictor.predict(given.volume)
    except InputRejected as error:
        raise ImportRefused(f"{given.name}: cannot be a sanity case: {error}") from error
    if given.reference is not None:
        difference = grid_difference(given.volume.geometry, given.reference.geometry)
        if difference is not None and difference.is_error:
            raise ImportRefused(f"{given.name}: the reference: {difference.text}")
        unknown = set(np.unique(given.reference.array).tolist()) - {*manager.values, manager.ignore_label}
        if unknown:
            raise ImportRefused(f"{given.name}: the reference has {min(unknown)}, which is no label of this model")
        dice = reference_figures(
            given.reference.array, prediction.labels.array, bundle.labels, ignore_label=manager.ignore_label
        )
    case = SanityCase(
        name=name,
        phantom=None,
        image_sha256=None,
        geometry=given.volume.geometry,
        voxels={segment.name: segment.voxels for segment in prediction.segments},
        dice=dice,
    )
    write_case(bundle.root, case, prediction.labels.array, image=given.volume, reference=given.reference)
    return case


def _one_fold(bundle: Bundle, configuration: BundleConfiguration) -> list[str] | None:
    """A fold that this configuration and the stages before it have; None (all) where there is none in common."""
    folds = {fold.fold for fold in configuration.folds}
    earlier = configuration.previous_stage
    while earlier is not None:
        stage = bundle.configuration(earlier)
        folds &= {fold.fold for fold in stage.folds}
        earlier = stage.previous_stage
    return [fold.fold for fold in configuration.folds if fold.fold in folds][:1] or None


def dataset_cases(dataset: RawDataset, names: Sequence[str]) -> list[SiteCase]:
    """Cases of a training dataset, with their labels as references. Raises DatasetInvalid for a name that is no case,
    InputRejected for one that cannot be read."""
    cases = {case.name: case for case in dataset.cases}
    found = []
    for name in dict.fromkeys(names):
        if name not in cases:
            raise DatasetInvalid(f"{name[:80]!r} is no case of {dataset.name}")
        loaded = read_case(cases[name], dataset.json)
        found.append(SiteCase(name=name, volume=loaded.volume, reference=loaded.labels))
    return found


def read_site_folder(folder: Path, *, channels: int) -> list[SiteCase]:
    """Cases of a folder: CASE_0000.nii.gz for each channel, and CASE.nii.gz as the reference if it is there; or the
    same in imagesTr and labelsTr below it. Raises ImportRefused."""
    images, references = (folder / "imagesTr", folder / "labelsTr")
    if not images.is_dir():
        images = references = folder
    firsts = sorted(path for path in images.glob("*_0000.nii*") if not path.name.startswith("."))
    if not firsts:
        raise ImportRefused(f"{folder.name}: holds no CASE_0000.nii.gz, nor does imagesTr in it")
    cases = []
    for first in firsts:
        name, ending = first.name.rsplit("_0000", 1)
        reference = references / f"{name}{ending}"
        try:
            volume = read_nifti([images / f"{name}_{index:04}{ending}" for index in range(channels)])
            labels = read_label_map(reference) if reference.is_file() else None
        except InputRejected as error:
            raise ImportRefused(f"{name}: cannot be a sanity case: {error}") from error
        cases.append(SiteCase(name=name, volume=volume, reference=labels))
    return cases
