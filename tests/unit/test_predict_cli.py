"""nnU-Net's way to write options is understood, and what cannot be done is refused with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.predict_cli import spread
from gateway.prediction.request import PredictRequest, UsageRefused, check_request

REQUEST = PredictRequest(inputs=(Path("in"),), output=Path("out"), model="bundle")


def test_options_with_several_values_take_all_words_to_the_next_option() -> None:
    assert spread(["-i", "a", "b", "-f", "0", "1", "all", "-c", "2d", "--verbose"]) == [
        *("-i", "a", "-i", "b", "-f", "0", "-f", "1", "-f", "all", "-c", "2d", "--verbose")
    ]


def test_other_options_keep_their_one_value() -> None:
    words = ["-step_size", "0.5", "-o", "out", "-f", "0", "--input", "x"]
    assert spread(words) == words


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "name the model"),
        ({"dataset": "4"}, "name the model"),
        ({"model": None, "dataset": "4"}, "-d needs one configuration"),
        ({"plans": "nnUNetPlans"}, "-p is part of nnU-Net's address"),
        ({"trainer": "nnUNetTrainer"}, "-tr is part of nnU-Net's address"),
        ({"previous_stage_predictions": Path("x")}, "the model brings that stage"),
        ({"not_on_device": True}, "main memory"),
        ({"device": "mps"}, "cpu or cuda"),
        ({"num_parts": 2, "part_id": 2}, "it is 0 to 1"),
        ({"name": "../a"}, "--name"),
        ({"name": ""}, "--name"),
        ({"seg_encoding": "LABELMAP"}, "needs --format seg"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    check_request(REQUEST)
    with pytest.raises(UsageRefused, match=reason):
        check_request(replace(REQUEST, **changes))
