from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import BackendFailed
from engine.sliding_window import WindowGrid, gaussian_weights, mirror_combinations, predict_logits, window_positions

FloatArray = NDArray[np.float32]


class FunctionBackend:
    """A network that is a function of the batch."""

    name, version, provider, precision, threads, batch = "function", "1", "cpu", "float32", 1, 1

    def __init__(self, function: Callable[[FloatArray], FloatArray]) -> None:
        self._function = function
        self.batches: list[tuple[int, ...]] = []

    def run(self, batch: FloatArray) -> FloatArray:
        self.batches.append(batch.shape)
        return self._function(batch)

    def close(self) -> None:
        pass


def ramp(*shape: int) -> FloatArray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.requirement("ART-14")
@pytest.mark.parametrize(
    ("size", "patch", "starts"),
    [
        (110, 64, (0, 23, 46)),
        (300, 128, (0, 57, 115, 172)),
        (129, 128, (0, 1)),
        (64, 64, (0,)),
        (96, 64, (0, 32)),
        (97, 64, (0, 16, 33)),
    ],
)
def test_windows_lie_where_nnunet_puts_them(size: int, patch: int, starts: tuple[int, ...]) -> None:
    assert window_positions(size, patch, 0.5) == starts


def test_an_axis_shorter_than_the_patch_must_be_padded_first() -> None:
    with pytest.raises(ValueError, match="pad first"):
        window_positions(10, 16, 0.5)


@pytest.mark.requirement("ART-14")
def test_weights_peak_at_10_fall_as_a_gaussian_of_an_eighth_and_never_vanish() -> None:
    weights = gaussian_weights((32, 64))
    assert weights.shape == (32, 64)
    assert weights.max() == weights[16, 32] == 10
    assert weights[16 + 4, 32] == pytest.approx(10 * np.exp(-0.5), rel=2e-3)  # one sigma = 32 / 8
    assert weights[16, 32 + 8] == pytest.approx(10 * np.exp(-0.5), rel=2e-3)  # one sigma = 64 / 8
    assert weights.min() > 0
    assert not weights.flags.writeable


def test_all_subsets_of_the_mirror_axes_are_used() -> None:
    assert mirror_combinations((0, 1, 2)) == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
    assert mirror_combinations((1,)) == ((1,),)
    assert mirror_combinations(()) == ()


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 9, 21), (16, 8, 8), (3, 30, 5)])
def test_a_network_that_answers_its_input_gives_the_image_back(shape: tuple[int, int, int]) -> None:
    image = ramp(1, *shape)
    backend = FunctionBackend(lambda batch: np.concatenate([batch, -batch], axis=1))
    grid = WindowGrid(shape=shape, patch_size=(8, 8, 8), step_size=0.5)
    logits = predict_logits(image, grid, backend, heads=2, mirror_axes=(0, 1, 2))
    np.testing.assert_allclose(logits, np.concatenate([image, -image]), rtol=1e-5, atol=1e-4)
    assert backend.batches == [(1, 1, 8, 8, 8)] * (8 * len(grid))


@pytest.mark.requirement("ART-14")
def test_a_2d_network_sees_each_slice_apart() -> None:
    seen = []

    def network(batch: FloatArray) -> FloatArray:
        seen.append(float(batch.max()))
        return batch

    image = np.ones((1, 3, 6, 11), dtype=np.float32) * np.arange(1, 4, dtype=np.float32).reshape(1, 3, 1, 1)
    grid = WindowGrid(shape=(3, 6, 11), patch_size=(8, 8), step_size=0.5)
    logits = predict_logits(image, grid, FunctionBackend(network), heads=1)
    np.testing.assert_allclose(logits, image, rtol=1e-6)
    assert seen == [1, 1, 2, 2, 3, 3]
    assert len(grid) == 6


def test_overlapping_windows_are_weighted_by_the_gaussian() -> None:
    answers = iter((1.0, 3.0))
    backend = FunctionBackend(lambda batch: np.full_like(batch, next(answers)))
    grid = WindowGrid(shape=(8, 8, 12), patch_size=(8, 8, 8), step_size=0.5)
    logits = predict_logits(np.zeros((1, 8, 8, 12), dtype=np.float32), grid, backend, heads=1)
    weights = gaussian_weights((8, 8, 8))[4, 4]
    first, second = np.zeros(12), np.zeros(12)
    first[:8], second[4:] = weights, weights
    np.testing.assert_allclose(logits[0, 4, 4], (first + 3 * second) / (first + second), rtol=1e-6)


def test_padding_is_centred_and_the_odd_voxel_goes_above() -> None:
    seen: list[FloatArray] = []

    def network(batch: FloatArray) -> FloatArray:
        seen.append(batch.copy())
        return batch

    grid = WindowGrid(shape=(3, 8, 8), patch_size=(8, 8, 8), step_size=0.5)
    assert grid.padding == ((2, 3), (0, 0), (0, 0))
    predict_logits(np.ones((1, 3, 8, 8), dtype=np.float32), grid, FunctionBackend(network), heads=1)
    assert seen[0][0, 0, :, 0, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_mirrored_answers_are_turned_back_and_averaged() -> None:
    """A network that adds the position along x: the mean over both directions is flat."""
    position = np.arange(8, dtype=np.float32)
    backend = FunctionBackend(lambda batch: batch + position)
    grid = WindowGrid(shape=(8, 8, 8), patch_size=(8, 8, 8), step_size=0.5)
    observed = []
    logits = predict_logits(
        np.zeros((1, 8, 8, 8), dtype=np.float32),
        grid,
        backend,
        heads=1,
        mirror_axes=(2,),
        observe_mirroring=lambda plain, mirrored, weights: observed.append((plain, mirrored, weights)),
    )
    np.testing.assert_allclose(logits, 3.5, rtol=1e-6)
    ((plain, mirrored, weights),) = observed
    np.testing.assert_array_equal(plain[0, 0, 0], position)
    np.testing.assert_array_equal(mirrored[0, 0, 0], position[::-1])
    assert weights.shape == (8, 8, 8)


def test_each_window_is_reported() -> None:
    count = [0]

    def advance() -> None:
        count[0] += 1

    grid = WindowGrid(shape=(8, 8, 20), patch_size=(8, 8, 8), step_size=0.5)
    predict_logits(
        np.zeros((1, 8, 8, 20), dtype=np.float32), grid, FunctionBackend(lambda b: b), heads=1, advance=advance
    )
    assert count[0] == len(grid) == 4


def test_answers_that_are_not_finite_or_of_another_shape_fail() -> None:
    grid = WindowGrid(shape=(8, 8, 8), patch_size=(8, 8, 8), step_size=0.5)
    image = np.zeros((1, 8, 8, 8), dtype=np.float32)
    with pytest.raises(BackendFailed, match="not finite"):
        predict_logits(image, grid, FunctionBackend(lambda batch: batch + np.float32(np.inf)), heads=1)
    with pytest.raises(BackendFailed, match="where"):
        predict_logits(image, grid, FunctionBackend(lambda batch: batch), heads=2)
