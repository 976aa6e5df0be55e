"""What benchmarks.plan makes of its measurements."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.plan import largest_difference, summarize
from benchmarks.process_tree import Usage


def usage(wall_s: float, cpu_s: float, peak_mb: float = 0.0) -> Usage:
    return Usage(exit_code=0, wall_s=wall_s, cpu_s=cpu_s, peak_pss_mb=peak_mb, samples_per_s=25.0)


def test_ratios_are_of_medians_and_memory_is_of_the_sampled_turn() -> None:
    turns = [
        {"nnunet": usage(30, 40), "seggate": usage(10, 20)},
        {"nnunet": usage(90, 40), "seggate": usage(5, 10)},
        {"nnunet": usage(60, 30), "seggate": usage(99, 5)},
    ]
    found = summarize(turns, {"nnunet": usage(500, 500, 1500), "seggate": usage(1, 1, 500)})
    assert (found["wall_ratio"], found["cpu_ratio"], found["peak_pss_ratio"]) == (6.0, 4.0, 3.0)
    assert found["wall_s"] == {"nnunet": [30, 90, 60], "seggate": [10, 5, 99]}


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ({"a": [1, 2.0], "b": "x"}, {"a": [1, 2.0], "b": "x"}, 0.0),
        ({"a": [1, 2.0]}, {"a": [1, 2.5]}, 0.2),
        ({"a": -1e-9}, {"a": 1e-9}, 2.0),
        ({"a": 0}, {"a": 0.0}, 0.0),
        ({}, {}, 0.0),
        ({"a": 1}, {"b": 1}, math.inf),
        ([1, 2], [1], math.inf),
        ({"a": "x"}, {"a": "y"}, math.inf),
        ({"a": None}, {"a": 0}, math.inf),
        ({"a": True}, {"a": 2}, math.inf),
    ],
)
def test_two_documents_differ_by_their_numbers_or_beyond_measure(one: Any, other: Any, difference: float) -> None:
    assert largest_difference(one, other) == pytest.approx(difference)
