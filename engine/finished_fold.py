"""A finished fold against what is asked for: it is left as it is only where it would be trained alike again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engine.errors import DatasetInvalid, TrainingRefused
from engine.experiment import REQUEST
from engine.json_reader import read_json
from engine.training_identity import changed_cases, differences

DATA, IDENTITY, SCHEDULE, PRECISION = "data", "identity", "schedule", "precision"
"""Keys of training.json: digest of all the fold's cases (engine/data_digest.py), the trainer's identity."""
_CASES = {"train": "training cases", "hold_out": "held-out cases", "val": "validation cases"}
_PLAIN = ("profile", "seed", "deterministic", "mirror_axes", "inference_mirror_axes")
# Of the identity, what nothing else says.
_OF_CASES = "previous stage"
_DIGESTS = ("plans", "labels", "augmentation", _OF_CASES, "optimiser", "start", "rehearsal")


def refuse_other_training(
    folder: Path, asked: Mapping[str, Any], *, any_precision: bool = False, excluded: Collection[str] = ()
) -> None:
    """Raises TrainingRefused with everything in which `asked` (what training.json would say now) differs from the
    finished fold's training.json. `any_precision`: none was asked for, each will do.

    What an earlier version did not note is not compared. A fold that knows cases which are `excluded` since is left as
    it is: `select` and `export` say so.
    """
    before = read_json(folder / REQUEST, error=DatasetInvalid)
    found = _differences(before, asked, any_precision=any_precision, excluded=excluded)
    if found:
        raise TrainingRefused(
            f"{folder.parent.name}/{folder.name} is finished and is of another training ({'; '.join(found)}). To train "
            f"it again remove {folder}, or choose another --results; to keep it, ask for what it was trained with"
        )


def _differences(
    before: Mapping[str, Any], asked: Mapping[str, Any], *, any_precision: bool, excluded: Collection[str]
) -> list[str]:
    known = {key: before[key] for key in _CASES if key in before}
    kept = {key: [name for name in names if name not in excluded] for key, names in known.items()}
    # Digests are of all the cases that there were.
    is_whole = all(len(kept[key]) == len(names) for key, names in known.items())
    plain = [*_PLAIN, *([] if any_precision else [PRECISION])]
    found = differences(before.get(SCHEDULE, {}), asked[SCHEDULE])
    found += differences(before, {key: asked[key] for key in plain})
    cases = [changed_cases(words, kept.get(key, asked[key]), asked[key]) for key, words in _CASES.items()]
    found += [text for text in cases if text is not None]
    if not found:
        identity = asked[IDENTITY]
        found = differences(before.get(IDENTITY, {}), {k: identity[k] for k in _DIGESTS if is_whole or k != _OF_CASES})
    if is_whole and not any(cases) and before.get(DATA, asked[DATA]) != asked[DATA]:
        found.append("images or label maps have changed since")
    return found
