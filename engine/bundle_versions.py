"""Which bundles were made of which networks, and what version the next one has.

    <results>/<dataset>/bundles/
      1.0.0/  1.1.0/       bundles
      made_of.json         of each version what it was made of: weights by configuration and fold, how they are joined,
                           post-processing, labels and channels

MAJOR changes with labels or channels, MINOR with the networks, PATCH with anything else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.bundle import Bundle, load_bundle
from engine.errors import BundleInvalid, DatasetInvalid
from engine.experiment import REQUEST, Experiment
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.manifest import MANIFEST, semver_numbers
from engine.model_figures import Chosen
from engine.result_folder import open_result

MADE_OF = "made_of.json"
FIRST = "1.0.0"
_TRIED = "calibration_tried"


@dataclass(frozen=True, kw_only=True)
class MadeOf:
    """Digests, and of the weights one for each "configuration/fold"."""

    interface: str
    weights: Mapping[str, str]
    joining: str


def made_of(experiment: Experiment, results: Path, chosen: Chosen, *, ensemble: str) -> MadeOf:
    """What a bundle of the choice is made of. Raises DatasetInvalid, ImportRefused when a network is gone."""
    with open_result(results / experiment.name, folds=chosen.folds) as result:
        weights = {
            f"{configuration.name}/{fold.fold}": _weights(fold.checkpoint)
            for configuration in result.configurations
            for fold in configuration.folds
        }
        trainers = sorted({configuration.trainer for configuration in result.configurations})
        interface = [
            [(label.name, label.region) for label in result.label_manager.foreground],
            experiment.dataset.json.channel_names,
        ]
        joining = [ensemble, trainers, result.plans.plans_name, result.postprocessing]
    return MadeOf(interface=_digest(interface), weights=weights, joining=_digest(joining))


def find_bundle(folder: Path, wanted: MadeOf, *, calibrates: bool = False) -> Bundle | None:
    """The latest bundle in `folder` that is made of just that; with `calibrates`, of those for which a calibration was
    tried. None where there is none. Raises BundleInvalid."""
    untried = _uncalibrated(folder) if calibrates else frozenset()
    found = [version for version, there in _noted(folder).items() if there == wanted and version not in untried]
    return load_bundle(folder / max(found, key=semver_numbers)) if found else None


def next_version(folder: Path, wanted: MadeOf) -> tuple[str, str]:
    """The version that a new bundle has, and why it is not an earlier one ("" for the first)."""
    there = _versions(folder)
    if not there:
        return FIRST, ""
    last = max(there, key=semver_numbers)
    major, minor, patch = semver_numbers(last)
    known = _noted(folder).get(last)
    if known is not None and known.interface != wanted.interface:
        return f"{major + 1}.0.0", f"{last} has other labels or channels"
    if known == wanted:
        return f"{major}.{minor}.{patch + 1}", f"{last} was made without a calibration"
    if known is not None and known.weights == wanted.weights:
        return f"{major}.{minor}.{patch + 1}", f"{last} has the same networks, joined or post-processed otherwise"
    why = f"{last} is of other networks" if known is not None else f"nobody noted what {last} was made of"
    return f"{major}.{minor + 1}.0", why


def note_bundle(bundle: Bundle, made: MadeOf, *, calibrates: bool = True) -> None:
    """Notes beside a bundle what it was made of, and whether a calibration was tried."""
    folder = bundle.root.parent
    content = read_json(folder / MADE_OF, error=DatasetInvalid) if (folder / MADE_OF).exists() else {}
    kept = {version: entry for version, entry in content.items() if (folder / version / MANIFEST).exists()}
    entry = {"weights_digest": bundle.weights_digest, **asdict(made), _TRIED: calibrates}
    write_json({**kept, bundle.root.name: entry}, folder / MADE_OF)


def _noted(folder: Path) -> dict[str, MadeOf]:
    """Of the bundles that are there, and are those that were noted. Raises DatasetInvalid for a damaged file."""
    path = folder / MADE_OF
    if not path.exists():
        return {}
    document = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid)
    found = {}
    for version in _versions(folder):
        if version not in document:
            continue
        entry = document.child(version)
        try:
            bundle = load_bundle(folder / version, verify=False)
        except BundleInvalid:
            continue
        if bundle.weights_digest == entry.text("weights_digest"):
            weights = entry.child("weights")
            found[version] = MadeOf(
                interface=entry.text("interface"),
                weights={name: weights.text(name) for name in weights.keys()},  # noqa: SIM118
                joining=entry.text("joining"),
            )
    return found


def _uncalibrated(folder: Path) -> frozenset[str]:
    """Versions for which no calibration was tried; an earlier release did not note it, and tried as a rule."""
    content = read_json(folder / MADE_OF, error=DatasetInvalid) if (folder / MADE_OF).exists() else {}
    return frozenset(v for v, entry in content.items() if isinstance(entry, dict) and entry.get(_TRIED) is False)


def _versions(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if _is_version(path.name) and path.is_dir()]


def _is_version(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and all(part.isascii() and part.isdecimal() for part in parts)


def _weights(checkpoint: Path) -> str:
    """As training.json has it; of a fold that nnU-Net trained, of the file."""
    path = checkpoint.parent / REQUEST
    if path.exists():
        request = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid)
        if "weights" in request:
            return request.text("weights")
    with checkpoint.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
