"""The peak of a prediction is what was estimated beforehand: never more, and at most a quarter less."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.peak_memory import CASES
from tests.support.peers import ROOT


@pytest.mark.requirement("INF-34", open="a smaller batch of windows, a CPU in place of a GPU")
@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_never_above_its_estimate_and_at_most_a_quarter_below(name: str) -> None:
    command = [sys.executable, "-m", "tests.support.peak_memory", name]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600)
    found = json.loads(ended.stdout)
    assert found["measured"] <= found["estimated"] <= 1.25 * found["measured"], found


@pytest.mark.parametrize(("runtime", "count"), [("onnxruntime", 1000), ("openvino", 300)])
def test_memory_stays_flat_over_many_volumes_of_mixed_shapes(runtime: str, count: int) -> None:
    command = [sys.executable, "-m", "tests.support.many_volumes", str(count), runtime]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=1200)
    sizes = json.loads(ended.stdout)
    assert len(sizes) == count / 100
    assert max(sizes[1:]) <= 1.03 * sizes[0], sizes
