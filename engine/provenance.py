"""Where a model comes from: the data's licence and origin, the cases it learned from, how each fold was trained.

Cases are counted and their list is known by a digest: the SHA-256 over the sorted lines of the SHA-256 of each case's
name. Whoever has the dataset can check it; nobody reads names from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.json_reader import Reader, read_json

PROVENANCE_JSON = "provenance.json"
FORMAT = 1
DATA_KEYS = ("name", "licence", "reference", "release")
MAX_TEXT = 1000
_MAX_CASES = 10**7
_MAX_FOLDS = 3200
_LATER = frozenset({"excluded", "exclusions_digest", "data_digest", "validation"})
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What says of a dataset.json who its cases are, or where their files lie.
_PRIVATE = frozenset({"patients", "dataset", "training", "test", "excluded"})
# Written by engine/fold_training.py into a fold's folder.
_REQUEST, _EPOCHS = "training.json", "training_log.jsonl"
_GROUPS = ("train", "hold_out", "val")


@dataclass(frozen=True, kw_only=True)
class DataOrigin:
    """What the networks learned from. Texts are "" where nobody said. `cases` of all folds together; None and no digest
    where only nnU-Net's files are known, which name no cases. `excluded` cases of the dataset were left out, as its
    exclusions said when the bundle was exported; None is unknown."""

    name: str
    licence: str
    reference: str
    release: str
    cases: int | None
    cases_digest: str | None
    excluded: int | None = None
    exclusions_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class FoldTraining:
    """How one network was trained; None is unknown. `checkpoint`: final, best, or given alone. `epochs` were trained of
    `planned_epochs`. `training_cases` and their digest leave out a hold-out. `data_digest` is of the content of all the
    fold's cases, images and labels (engine/data_digest.py): it changes with a corrected label."""

    configuration: str
    fold: str
    trainer: str
    checkpoint: str
    software: str | None
    epochs: int | None
    planned_epochs: int | None
    iterations: int | None
    precision: str | None
    seed: int | None
    deterministic: bool | None
    training_cases: int | None
    validation_cases: int | None
    training_cases_digest: str | None
    data_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelValidation:
    """Means over the cases; None where no case says anything."""

    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The cross-validation of the networks: `dice` is the mean of the foreground, `labels` by name."""

    cases: int
    dice: float | None
    labels: Mapping[str, LabelValidation]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """`exported_by`: name and version of the software that wrote the bundle. `validation` is None where there was
    none."""

    data: DataOrigin
    training: tuple[FoldTraining, ...]
    exported_by: str
    validation: Validation | None = None


def this_software() -> str:
    return f"seggate {version('seggate')}"


def cases_digest(names: Iterable[str]) -> str:
    """SHA-256 over the sorted lines of the names' own SHA-256."""
    lines = sorted(hashlib.sha256(name.encode()).hexdigest() + "\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def public_dataset_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """dataset.json without what names cases, patients and files: a bundle travels."""
    return {key: value for key, value in document.items() if key not in _PRIVATE}


def public_fingerprint_json(document: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A fingerprint without the names of its cases."""
    ours = document.get("seggate") if document is not None else None
    if document is None or not isinstance(ours, Mapping):
        return None if document is None else dict(document)
    return {**document, "seggate": {key: value for key, value in ours.items() if key != "cases"}}


def data_origin(
    dataset_json: Mapping[str, Any],
    stated: Mapping[str, str],
    names: Iterable[str],
    *,
    dataset_name: str,
    excluded: Iterable[str] | None = None,
) -> DataOrigin:
    """From dataset.json's `name`, `licence` (or `license`), `reference` and `release`; what is `stated` (a card's
    [data]) goes first. `names`: all cases that are known, may be none. `excluded`: those that the dataset leaves out,
    None where nobody knows."""
    found = {key: stated.get(key) or _text(dataset_json.get(key)) for key in DATA_KEYS}
    found["licence"] = found["licence"] or _text(dataset_json.get("license"))
    listed, left_out = sorted(set(names)), None if excluded is None else set(excluded)
    counted = dataset_json.get("numTraining")
    is_count = isinstance(counted, int) and not isinstance(counted, bool) and 0 < counted <= _MAX_CASES
    return DataOrigin(
        name=found["name"] or dataset_name,
        licence=found["licence"],
        reference=found["reference"],
        release=found["release"],
        cases=len(listed) or (counted if is_count else None),
        cases_digest=cases_digest(listed) if listed else None,
        excluded=None if left_out is None else len(left_out),
        exclusions_digest=cases_digest(left_out) if left_out else None,
    )


def describe_fold(
    folder: Path,
    *,
    configuration: str,
    fold: str,
    trainer: str,
    checkpoint: str,
    epochs: int | None,
    error: type[Exception],
) -> tuple[FoldTraining, frozenset[str]]:
    """What a fold's folder says: our training.json and log where they are, else what is given (of a checkpoint that
    nnU-Net wrote). And the names of all cases of the fold, training, hold-out and validation; none where unknown.

    Raises `error` for a training.json that is damaged.
    """
    if not (folder / _REQUEST).is_file():
        return (
            FoldTraining(
                configuration=configuration,
                fold=fold,
                trainer=trainer,
                checkpoint=checkpoint,
                software=None,
                epochs=epochs,
                planned_epochs=None,
                iterations=None,
                precision=None,
                seed=None,
                deterministic=None,
                training_cases=None,
                validation_cases=None,
                training_cases_digest=None,
            ),
            frozenset(),
        )
    request = Reader(read_json(folder / _REQUEST, error=error), where=_REQUEST, error=error)
    schedule = request.child("schedule", {})
    groups = {key: frozenset(request.texts(key, lengths=(0, _MAX_CASES), default=())) for key in _GROUPS}
    return (
        FoldTraining(
            configuration=configuration,
            fold=fold,
            trainer=trainer,
            checkpoint=checkpoint,
            software=request.text_or_none("software"),
            epochs=_trained_epochs(folder / _EPOCHS) or epochs,
            planned_epochs=_integer(schedule, "epochs"),
            iterations=_integer(schedule, "iterations"),
            precision=request.text_or_none("precision"),
            seed=_integer(request, "seed"),
            deterministic=request.boolean("deterministic") if "deterministic" in request else None,
            training_cases=len(groups["train"]),
            validation_cases=len(groups["val"]),
            training_cases_digest=cases_digest(groups["train"]),
            data_digest=request.text_or_none("data"),
        ),
        frozenset[str]().union(*groups.values()),
    )


def provenance_document(provenance: Provenance) -> dict[str, Any]:
    """The content of provenance.json."""

    def written(entry: Mapping[str, Any]) -> dict[str, Any]:
        # Only where known, so that a provenance from before they existed stays byte for byte the same.
        return {key: value for key, value in entry.items() if key not in _LATER or value is not None}

    document = asdict(provenance)
    document |= {"data": written(document["data"]), "training": [written(fold) for fold in document["training"]]}
    return {"format": FORMAT, **written(document)}


def read_provenance(document: Mapping[str, Any], *, error: type[Exception]) -> Provenance:
    """The provenance in a document; raises `error` with the key for what is missing or of wrong type or range."""
    reader = Reader(document, where=PROVENANCE_JSON, error=error)
    if reader.integer("format", 0, 2**16) != FORMAT:
        raise reader.fail("format", f"is not {FORMAT}")
    data = reader.child("data")
    return Provenance(
        data=DataOrigin(
            **{key: data.text(key, empty=True) for key in DATA_KEYS},
            cases=_integer(data, "cases"),
            cases_digest=_digest(data, "cases_digest"),
            excluded=_integer(data, "excluded"),
            exclusions_digest=_digest(data, "exclusions_digest"),
        ),
        training=tuple(
            FoldTraining(
                configuration=entry.text("configuration"),
                fold=entry.text("fold"),
                trainer=entry.text("trainer"),
                checkpoint=entry.text("checkpoint"),
                software=entry.text_or_none("software"),
                epochs=_integer(entry, "epochs"),
                planned_epochs=_integer(entry, "planned_epochs"),
                iterations=_integer(entry, "iterations"),
                precision=entry.text_or_none("precision"),
                seed=_integer(entry, "seed"),
                deterministic=None if entry.raw("deterministic") is None else entry.boolean("deterministic"),
                training_cases=_integer(entry, "training_cases"),
                validation_cases=_integer(entry, "validation_cases"),
                training_cases_digest=_digest(entry, "training_cases_digest"),
                data_digest=entry.text_or_none("data_digest"),
            )
            for entry in reader.children("training", lengths=(0, _MAX_FOLDS))
        ),
        exported_by=reader.text("exported_by"),
        validation=None if reader.raw("validation", None) is None else _validation(reader.child("validation")),
    )


def _validation(reader: Reader) -> Validation:
    labels = reader.child("labels")
    return Validation(
        cases=reader.integer("cases", 0, _MAX_CASES),
        dice=_figure(reader, "dice", 1.0),
        labels={
            name: LabelValidation(
                dice=_figure(labels.child(name), "dice", 1.0),
                hd95_mm=_figure(labels.child(name), "hd95_mm", 1e6),
                surface_dice=_figure(labels.child(name), "surface_dice", 1.0),
            )
            for name in labels.keys()  # noqa: SIM118 - Reader is no mapping; keys() checks each key
        },
    )


def _figure(entry: Reader, key: str, most: float) -> float | None:
    return None if entry.raw(key, None) is None else entry.number(key, 0.0, most)


def _trained_epochs(log: Path) -> int:
    """Lines of the log of epochs; 0 where there is none."""
    if not log.is_file():
        return 0
    with log.open("rb") as lines:
        return sum(1 for _ in lines)


def _text(value: object) -> str:
    """A text of dataset.json in one line; "" for anything else, and for what is no licence but a document."""
    return " ".join(value.split()) if isinstance(value, str) and len(value) <= MAX_TEXT else ""


def _integer(entry: Reader, key: str) -> int | None:
    return None if entry.raw(key, None) is None else entry.integer(key, 0, 2**63 - 1)


def _digest(entry: Reader, key: str) -> str | None:
    value = entry.text_or_none(key)
    if value is not None and not _SHA256.fullmatch(value):
        raise entry.fail(key, "is no SHA-256 in lower case hexadecimal")
    return value
