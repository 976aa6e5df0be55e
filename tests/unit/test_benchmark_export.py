"""benchmarks.export: logits that are made in pieces, and the export of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.blob_logits import BlobLogits, BlobNetwork
from benchmarks.export import CASES, GROWTH, NETWORK_SPACING_MM, SPACING_MM, count_different
from benchmarks.export_own import export
from engine.sliding_window import WindowGrid

INNER, OUTER = (40, 36, 44), (40, 67, 82)


@pytest.fixture(scope="module")
def whole() -> np.ndarray[Any, np.dtype[np.float32]]:
    """All logits (classes, Z, Y, X)."""
    return np.stack([plane.copy() for plane in BlobLogits(9, INNER).planes()], axis=1)


def test_a_box_is_made_as_it_is_in_the_whole(whole: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    box = np.empty((9, 8, 20, 10), dtype=np.float32)
    BlobLogits(9, INNER).fill((5, 11, 30), box)
    np.testing.assert_allclose(box, whole[:, 5:13, 11:31, 30:40], atol=1e-4)


def test_every_class_leads_somewhere_and_changes_smoothly(whole: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    winners = whole.argmax(axis=0)
    assert set(np.unique(winners)) == set(range(9))
    assert 0.1 < (winners == 0).mean() < 0.9
    assert (winners[1:] == winners[:-1]).mean() > 0.8


def test_windows_come_in_the_order_of_the_grid(whole: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    grid = WindowGrid(shape=INNER, patch_size=(24, 20, 32), step_size=0.5)
    network = BlobNetwork(BlobLogits(9, INNER), grid)
    batch = np.zeros((1, 1, *grid.patch_size), dtype=np.float32)
    along_z, along_y, along_x = grid.positions()
    for z in along_z:
        for y in along_y:
            for x in along_x:
                found = network.run(batch)[0]
                np.testing.assert_allclose(found, whole[:, z : z + 24, y : y + 20, x : x + 32], atol=1e-4)
    assert network.cpu_s > 0


def test_a_window_larger_than_the_image_is_refused() -> None:
    grid = WindowGrid(shape=(8, 36, 44), patch_size=(24, 20, 32), step_size=0.5)
    with pytest.raises(ValueError, match="smaller than the window"):
        BlobNetwork(BlobLogits(2, grid.shape), grid)


def test_window_by_window_gives_the_labels_of_the_stored_logits(
    whole: np.ndarray[Any, np.dtype[np.float32]], tmp_path: Path
) -> None:
    np.save(tmp_path / "logits.npy", whole.astype(np.float16))
    common = {
        "classes": 9,
        "network_shape": INNER,
        "network_spacing_mm": NETWORK_SPACING_MM,
        "shape": OUTER,
        "spacing_mm": SPACING_MM,
        "threads": 1,
    }
    files = [str(tmp_path / f"{name}.npy") for name in ("stored", "windows")]
    stored = export({**common, "logits": str(tmp_path / "logits.npy"), "labels": files[0]})
    windows = export({**common, "patch": (24, 20, 32), "labels": files[1]})
    different, voxels = count_different(Path(files[0]), Path(files[1]))
    assert voxels == 40 * 67 * 82
    # Sums of weighted windows are rounded otherwise; near-ties may fall either way.
    assert different <= 1e-3 * voxels
    assert windows["labels_found"] == 9
    assert (stored["generator_cpu_s"], stored["generator_wall_s"]) == (0.0, 0.0)
    assert windows["generator_cpu_s"] > 0
    assert windows["cpu_s"] > 0


def test_label_maps_of_other_shapes_are_not_compared(tmp_path: Path) -> None:
    for name, shape in (("one", (3, 4, 5)), ("two", (3, 4, 6))):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(SystemExit, match=r"one.npy is \(3, 4, 5\)"):
        count_different(tmp_path / "one.npy", tmp_path / "two.npy")


def test_growth_doubles_the_voxels() -> None:
    by_classes: dict[int, list[int]] = {}
    for case in GROWTH:
        by_classes.setdefault(case.classes, []).append(int(np.prod(case.network_shape)))
    assert sorted(by_classes) == [2, 8, 25, 104]
    for first, second, fourth in by_classes.values():
        assert second == 2 * first
        assert fourth == pytest.approx(4 * first, rel=0.01)
    assert {case.name for case in CASES} == {"export-8", "export-104"}
