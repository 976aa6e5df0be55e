"""What is known of a model that was trained here, for its card: figures of its validation, origin, voxel order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.dataset import RawDataset
from engine.errors import DatasetInvalid
from engine.experiment import REQUEST, Experiment
from engine.json_reader import Reader, read_json
from engine.labels import Label, LabelManager
from engine.metrics import SUMMARY, read_summary
from engine.model_card import ModelCard
from engine.nifti import read_orientation
from engine.postprocessing_search import POSTPROCESSED
from engine.provenance import LabelValidation, Validation
from engine.selection import INFORMATION_JSON, PREDICTED_BY
from engine.validated_fold import validated_fold
from engine.volume import AS_STORED


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What `seggate select` wrote down. `summary` is the cross-validation's, after post-processing."""

    trainer: str
    configurations: tuple[str, ...]
    folds: tuple[str, ...]
    summary: Mapping[str, Any]
    predicted_by: Mapping[str, Any]


def read_choice(experiment: Experiment, results: Path) -> Chosen:
    """Raises DatasetInvalid when nothing was selected yet, or what was selected is gone."""
    path = results / experiment.name / INFORMATION_JSON
    if not path.exists():
        raise DatasetInvalid(f"{experiment.name}: nothing is selected yet; run `seggate select` first")
    information = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid)
    best = information.child("best_model_or_ensemble")
    models = best.children("selected_model_or_models", lengths=(1, 8))
    folds = information.integers("folds", 0, 999, lengths=(1, 1000))
    # Relative to this folder: it may have been moved since.
    winner = Path(best.text("postprocessing_file")).parent
    inside = Path(*winner.parts[-2:])
    return Chosen(
        trainer=models[0].text("trainer"),
        configurations=tuple(model.text("configuration") for model in models),
        folds=tuple(map(str, folds)),
        summary=read_summary(results / experiment.name / inside / POSTPROCESSED / SUMMARY),
        predicted_by=information.raw(PREDICTED_BY) if PREDICTED_BY in information.keys() else {},  # noqa: SIM118
    )


def check_choice(chosen: Chosen, experiment: Experiment, results: Path) -> None:
    """Raises DatasetInvalid when what was selected is not what would be exported: a fold was trained anew since, or its
    figures are not those of the networks that are there (`validated_fold`)."""
    for configuration in chosen.configurations:
        known = chosen.predicted_by.get(configuration, {})
        for fold in chosen.folds:
            validated = validated_fold(
                experiment, results, trainer=chosen.trainer, configuration=configuration, fold=fold
            )
            folder, before, now = validated.folder, known.get(fold), validated.predictor()
            if before is not None and before != now:
                raise DatasetInvalid(
                    f"{folder.parent.name}: {folder.name} was trained or validated anew since `seggate select`; select "
                    "again"
                )


@dataclass(frozen=True, kw_only=True)
class LearnedCases:
    """Of all chosen folds together, training, hold-out and validation; those of it that the dataset excludes now."""

    all: frozenset[str]
    excluded_since: tuple[str, ...]


def learned_cases(experiment: Experiment, results: Path, chosen: Chosen) -> LearnedCases:
    """As the folds' training.json say; for a fold that nnU-Net trained, as the splits do. Raises DatasetInvalid."""
    found: set[str] = set()
    planned = experiment.splits(with_excluded=True)
    for configuration in chosen.configurations:
        model = experiment.model_folder(results, chosen.trainer, configuration)
        for fold in chosen.folds:
            path, split = model / f"fold_{fold}" / REQUEST, planned[int(fold)]
            groups: tuple[Sequence[str], ...] = (split.train, split.val)
            if path.exists():
                request = Reader(read_json(path, error=DatasetInvalid), where=REQUEST, error=DatasetInvalid)
                keys = ("train", "hold_out", "val")
                groups = tuple(request.texts(key, lengths=(0, 10**7), default=()) for key in keys)
            found.update(name for group in groups for name in group)
    excluded = experiment.dataset.excluded_names
    return LearnedCases(all=frozenset(found), excluded_since=tuple(sorted(found & excluded)))


def complete_card(card: ModelCard, experiment: Experiment, chosen: Chosen, cases: LearnedCases) -> ModelCard:
    """The card with what it does not say itself: figures as description, origin, orientation."""
    document = experiment.dataset.json.document
    described = [str(document[key]) for key in ("name", "reference", "release") if document.get(key)]
    origin = (
        f"trained by seggate ({chosen.trainer}: {', '.join(chosen.configurations)}, folds {', '.join(chosen.folds)}) "
        f"on {len(cases.all)} cases of {experiment.name}"
    )
    if cases.excluded_since:
        origin += f", {len(cases.excluded_since)} of which excluded since"
    return replace(
        card,
        description=card.description or f"{experiment.name}. {_figures(experiment, chosen)}",
        origin=card.origin or "; ".join([origin, *described])[:1000],
        contract={"orientation": training_orientation(experiment.dataset), **card.contract},
    )


def _figures(experiment: Experiment, chosen: Chosen) -> str:
    text = figures(chosen, experiment.dataset.json.labels)
    mixed = experiment.mixed_patients(chosen.folds)
    return f"{text} {mixed}." if mixed is not None else text


def validation_of(chosen: Chosen, labels: LabelManager) -> Validation:
    """The cross-validation, for a bundle's provenance."""

    def finite(value: float) -> float | None:
        return round(float(value), 6) if math.isfinite(value) else None

    mean = chosen.summary["mean"]
    return Validation(
        cases=len(chosen.summary["metric_per_case"]),
        dice=finite(chosen.summary["foreground_mean"]["Dice"]),
        labels={
            label.name: LabelValidation(
                dice=finite(mean[_key(label)]["Dice"]),
                hd95_mm=finite(mean[_key(label)]["HD95"]),
                surface_dice=finite(mean[_key(label)]["SurfaceDice"]),
            )
            for label in labels.foreground
        },
    )


def _key(label: Label) -> str:
    """Of a label in summary.json."""
    return str(label.region[0]) if len(label.region) == 1 else str(label.region)


def figures(chosen: Chosen, labels: LabelManager) -> str:
    """The cross-validation in a sentence for each label."""
    mean, cases = chosen.summary["mean"], len(chosen.summary["metric_per_case"])
    parts = []
    for label in labels.foreground:
        key = _key(label)
        if not math.isnan(mean[key]["Dice"]):
            parts.append(
                f"{label.name}: Dice {mean[key]['Dice']:.4f}, HD95 {mean[key]['HD95']:.2f} mm, "
                f"surface Dice at 2 mm {mean[key]['SurfaceDice']:.4f}"
            )
    return (
        f"Cross-validation of these networks, each of {cases} cases by the fold that never saw it: "
        f"mean foreground Dice {chosen.summary['foreground_mean']['Dice']:.4f}; {'; '.join(parts)}."
    )


def training_orientation(dataset: RawDataset) -> str:
    """The voxel order of the training images; as-stored where they differ: the networks saw every one of them."""
    if dataset.json.orientation != AS_STORED:
        return dataset.json.orientation
    found = {read_orientation(case.channels[0]) for case in dataset.cases}
    return found.pop() if len(found) == 1 else AS_STORED
