from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from engine import memory
from engine.bundle import Bundle
from engine.errors import BundleInvalid
from engine.memory import available_bytes, estimate_peak, run_order
from engine.volume import Geometry
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle


def bundle(root: Path, *, heads: int = 3, orientation: str = "as-stored", folds: int = 1) -> Bundle:
    """A fine configuration of 1 mm and a cascade of 4 mm and 1 mm."""
    labels = {"background": 0, **{f"label {value}": value for value in range(1, heads)}}
    configurations = {
        "3d_fullres": configuration_json((16, 16, 16), (1, 1, 1)),
        "3d_lowres": configuration_json((16, 16, 16), (4, 4, 4)),
        "3d_cascade_fullres": configuration_json((16, 16, 16), (1, 1, 1), previous_stage="3d_lowres"),
    }
    for name in configurations:
        channels = heads if name == "3d_cascade_fullres" else 1
        for fold in range(folds):
            write_pointwise_network(
                root / name / f"fold_{fold}.onnx",
                np.zeros((heads, channels), dtype=np.float32),
                np.zeros(heads, dtype=np.float32),
                (16, 16, 16),
            )
    return write_tiny_bundle(root, labels=labels, configurations=configurations, orientation=orientation)


def grid(*shape: int) -> Geometry:
    z, y, x = shape
    return Geometry(shape=(z, y, x), affine_lps=np.eye(4))


def test_an_earlier_stage_runs_before_the_stage_that_needs_it(tmp_path: Path) -> None:
    model = bundle(tmp_path)
    assert [run.name for run in run_order(model)] == ["3d_fullres", "3d_lowres", "3d_cascade_fullres"]
    assert [run.name for run in run_order(model, ["3d_cascade_fullres"])] == ["3d_lowres", "3d_cascade_fullres"]
    assert [run.name for run in run_order(model, ["3d_lowres"])] == ["3d_lowres"]
    with pytest.raises(BundleInvalid, match="2d"):
        run_order(model, ["2d"])


@pytest.mark.requirement("INF-34", open="a smaller batch of windows, a CPU in place of a GPU")
def test_the_estimate_is_of_the_rows_in_use_and_not_of_all_logits(tmp_path: Path) -> None:
    shape = (200, 200, 200)
    few = estimate_peak(bundle(tmp_path / "few"), grid(*shape), configurations=["3d_fullres"])
    many = estimate_peak(bundle(tmp_path / "many", heads=50), grid(*shape), configurations=["3d_fullres"])
    # Half of the windows' 16 planes wait whole, half are filled by windows of 16 rows; and one plane more.
    assert many.parts["window sums"] == pytest.approx(51 * 4 * 200 * (8 * 200 + 8 * 17 + 200), rel=0.15)
    assert few.working_bytes < many.working_bytes < 50 * math.prod(shape) * 2 / 4
    assert sum(many.parts.values()) == many.bytes
    assert many.bytes - many.working_bytes == many.parts["networks"] > 0


def test_sums_in_a_file_take_no_memory(tmp_path: Path) -> None:
    model = bundle(tmp_path, heads=50)
    in_memory, in_file = (
        estimate_peak(model, grid(200, 200, 200), configurations=["3d_fullres"], sums_in_file=is_file)
        for is_file in (False, True)
    )
    assert in_memory.bytes - in_file.bytes == pytest.approx(in_memory.parts["window sums"], rel=0.4)


def test_more_folds_a_reorientation_and_a_larger_image_cost_more(tmp_path: Path) -> None:
    plain = estimate_peak(bundle(tmp_path / "a"), grid(64, 64, 64))
    assert estimate_peak(bundle(tmp_path / "b", folds=3), grid(64, 64, 64)).bytes > plain.bytes
    turned = estimate_peak(bundle(tmp_path / "c", orientation="RAS"), grid(64, 64, 64))
    assert turned.bytes > plain.bytes
    assert estimate_peak(bundle(tmp_path / "d"), grid(64, 64, 128)).bytes > plain.bytes


def test_spacing_counts_through_the_grid_of_the_network(tmp_path: Path) -> None:
    model = bundle(tmp_path)
    coarse = Geometry(shape=(50, 50, 50), affine_lps=np.diag([3.0, 3.0, 3.0, 1.0]))
    fine = Geometry(shape=(50, 50, 50), affine_lps=np.eye(4))
    assert estimate_peak(model, coarse).working_bytes > 4 * estimate_peak(model, fine).working_bytes


def test_a_control_group_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    machine = available_bytes()
    assert machine > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert available_bytes() == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 600000


def test_an_image_that_is_not_decoded_yet_counts_as_float32(tmp_path: Path) -> None:
    model = bundle(tmp_path)
    before, after = (estimate_peak(model, grid(64, 64, 64), decoded=decoded) for decoded in (False, True))
    assert before.bytes - after.bytes == before.parts["image"] == 64**3 * 4
