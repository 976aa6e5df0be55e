"""What the versions of a model have learnt from, as far as this gateway knows: datasets of raw cases, names of cases.

The dataset and the trained folder of learning.toml, and of every training that was run here the datasets and folds in
its folder. Locked cases must be none of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.dataset import DATASET_JSON, IMAGES, RawDataset, open_dataset
from engine.errors import DatasetInvalid
from engine.experiment import REQUEST
from engine.json_reader import Reader, read_json
from gateway.settings import Settings
from storage.learning_records import LearningRun

_MOST_CASES = 10**7


@dataclass(frozen=True, kw_only=True)
class LearntCases:
    """`names` are of cases that were trained or validated on; their datasets may be gone."""

    datasets: tuple[RawDataset, ...]
    names: frozenset[str]


def learnt_cases(session: Session, settings: Settings, name: str) -> LearntCases:
    """Of all versions of a model: what one of them learnt is in those that were trained further from it.

    Raises DatasetInvalid for a dataset or a training.json that is damaged.
    """
    learning = settings.learning.of(name)
    folders: list[Path] = [] if learning.dataset is None else [settings.located(learning.dataset)]
    requests: list[Path] = []
    if learning.trained is not None:
        requests += sorted(settings.located(learning.trained).glob(f"fold_*/{REQUEST}"))
    query = select(LearningRun.folder).where(LearningRun.model_name == name, LearningRun.folder.is_not(None))
    for run in dict.fromkeys(session.scalars(query.order_by(LearningRun.requested_at))):
        folder = settings.models_dir / str(run)
        folders += sorted(path.parent for path in folder.rglob(DATASET_JSON) if _has_images(path))
        requests += sorted(folder.rglob(REQUEST))
    return LearntCases(
        datasets=tuple(open_dataset(folder) for folder in folders),
        names=frozenset(case for path in requests for case in _names(path)),
    )


def _has_images(dataset_json: Path) -> bool:
    """Whether a dataset lies there, and not a copy of its dataset.json beside preprocessed cases or networks."""
    if (dataset_json.parent / IMAGES).is_dir():
        return True
    if "dataset" not in read_json(dataset_json, error=DatasetInvalid):
        return False
    cases = open_dataset(dataset_json.parent).cases
    return all(path.is_file() for case in cases for path in case.channels.values())


def _names(path: Path) -> Iterator[str]:
    where = f"{path.parent.name}/{REQUEST}"
    try:
        reader = Reader(read_json(path, error=DatasetInvalid), where=where, error=DatasetInvalid)
    except DatasetInvalid as error:
        raise DatasetInvalid(f"{where}: {error}") from error
    for key in ("train", "hold_out", "val"):
        yield from reader.texts(key, lengths=(0, _MOST_CASES), default=())
