"""A finished fold is taken for what is asked for only where it is that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import TrainingRefused
from engine.finished_fold import refuse_other_training
from engine.json_writer import write_json


def _request() -> dict[str, Any]:
    return {
        "profile": "nnunet",
        "seed": 4,
        "precision": "bf16",
        "deterministic": False,
        "mirror_axes": [0, 1, 2],
        "inference_mirror_axes": [0, 1, 2],
        "schedule": {"epochs": 20, "iterations": 100, "budget_s": None, "patience": None},
        "train": ["a", "b"],
        "hold_out": [],
        "val": ["c"],
        "data": "0123",
        "identity": {
            "plans": "p",
            "labels": "l",
            "augmentation": "x",
            "previous stage": None,
            "optimiser": [0.9],
            "start": None,
            "rehearsal": None,
            "seed": 4,
        },
    }


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(request: dict[str, Any]) -> None:
        for key in keys[:-1]:
            request = request[key]
        request[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("schedule", "epochs", value=50), "epochs: 20 then, 50 now"),
        (_set("schedule", "budget_s", value=1800.0), "budget_s: None then, 1800.0 now"),
        (_set("schedule", "patience", value=5), "patience: None then, 5 now"),
        (_set("seed", value=5), "seed: 4 then, 5 now"),
        (_set("precision", value="float32"), "precision: 'bf16' then, 'float32' now"),
        (_set("deterministic", value=True), "deterministic: False then, True now"),
        (_set("mirror_axes", value=[]), r"mirror_axes: \[0, 1, 2\] then, \[\] now"),
        (_set("train", value=["a", "d"]), "training cases: d now, b then"),
        (_set("val", value=["c", "d"]), "validation cases: d now"),
        (_set("hold_out", value=["b"]), "held-out cases: b now"),
        (_set("data", value="4567"), "images or label maps have changed since"),
        (_set("identity", "augmentation", value="y"), "augmentation: 'x' then, 'y' now"),
        (_set("identity", "plans", value="q"), "plans: 'p' then, 'q' now"),
        (_set("identity", "previous stage", value="z"), "previous stage: None then, 'z' now"),
    ],
)
def test_what_differs_is_named_with_what_to_do(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    write_json({**_request(), "result": {}}, tmp_path / "model/fold_0/training.json")
    asked = _request()
    refuse_other_training(tmp_path / "model/fold_0", asked)
    change(asked)
    with pytest.raises(TrainingRefused, match=f"model/fold_0 is finished.*{named}.*To train it again remove"):
        refuse_other_training(tmp_path / "model/fold_0", asked)


def test_everything_that_differs_is_said_at_once(tmp_path: Path) -> None:
    write_json(_request(), tmp_path / "training.json")
    asked = {**_request(), "seed": 5, "val": ["d"]}
    with pytest.raises(TrainingRefused, match=r"seed: 4 then, 5 now; validation cases: d now, c then\)"):
        refuse_other_training(tmp_path, asked)


def test_any_precision_will_do_where_none_was_asked_for(tmp_path: Path) -> None:
    write_json(_request(), tmp_path / "training.json")
    refuse_other_training(tmp_path, {**_request(), "precision": "fp16"}, any_precision=True)


def test_what_was_not_noted_then_is_not_compared(tmp_path: Path) -> None:
    noted = _request()
    for key in ("data", "identity"):
        del noted[key]
    write_json(noted, tmp_path / "training.json")
    refuse_other_training(tmp_path, _request())
