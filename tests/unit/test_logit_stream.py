from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import BackendFailed
from engine.labels import LabelManager
from engine.logit_stream import LogitStream, stored_logits
from engine.logits_to_labels import label_image, segment
from engine.row_threads import RowThreads
from engine.sliding_window import WindowGrid, gaussian_weights
from tests.unit.test_resampling import rule

FloatArray = NDArray[np.float32]
ONE = LabelManager.from_dataset_json({"labels": {"background": 0, "all": [1, 2]}, "regions_class_order": [1]})
TWO = LabelManager.from_dataset_json({"labels": {"background": 0, "a": 1}})


class FunctionBackend:
    """A network that is a function of the batch."""

    name, version, provider, precision, threads = "function", "1", "cpu", "float32", 1

    def __init__(self, function: Callable[[FloatArray], FloatArray], batch: int = 1) -> None:
        self.batch = batch
        self._function = function
        self.batches: list[tuple[int, ...]] = []

    def run(self, batch: FloatArray) -> FloatArray:
        self.batches.append(batch.shape)
        return self._function(batch)

    def close(self) -> None:
        pass


def ramp(*shape: int) -> FloatArray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def stream_of(
    image: FloatArray, grid: WindowGrid, *networks: FunctionBackend, labels: LabelManager = ONE, **options: Any
) -> LogitStream:
    return LogitStream(
        image,
        grid,
        networks,
        labels=labels,
        spacing_mm=(1.0, 1.0, 1.0),
        rule=rule(1),
        **{"threads": RowThreads(1), **options},
    )


def logits_of(
    image: FloatArray, grid: WindowGrid, *networks: FunctionBackend, labels: LabelManager = ONE, **options: Any
) -> NDArray[np.float16]:
    return stored_logits(stream_of(image, grid, *networks, labels=labels, **options)).logits


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 9, 21), (16, 8, 8), (3, 30, 5)])
def test_a_network_that_answers_its_input_gives_the_image_back(shape: tuple[int, int, int]) -> None:
    image = ramp(1, *shape)
    backend = FunctionBackend(lambda batch: np.concatenate([batch, -batch], axis=1))
    grid = WindowGrid(shape=shape, patch_size=(8, 8, 8), step_size=0.5)
    logits = logits_of(image, grid, backend, labels=TWO, mirror_axes=(0, 1, 2))
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
    logits = logits_of(image, grid, FunctionBackend(network))
    np.testing.assert_allclose(logits, image, rtol=1e-6)
    assert seen == [1, 1, 2, 2, 3, 3]
    assert len(grid) == 6


def test_overlapping_windows_are_weighted_by_the_gaussian() -> None:
    answers = iter((1.0, 3.0))
    backend = FunctionBackend(lambda batch: np.full_like(batch, next(answers)))
    grid = WindowGrid(shape=(8, 8, 12), patch_size=(8, 8, 8), step_size=0.5)
    logits = logits_of(np.zeros((1, 8, 8, 12), dtype=np.float32), grid, backend)
    weights = gaussian_weights((8, 8, 8))[4, 4]
    first, second = np.zeros(12), np.zeros(12)
    first[:8], second[4:] = weights, weights
    np.testing.assert_allclose(logits[0, 4, 4], (first + 3 * second) / (first + second), rtol=5e-4)  # half precision


def test_padding_is_centred_and_the_odd_voxel_goes_above() -> None:
    seen: list[FloatArray] = []

    def network(batch: FloatArray) -> FloatArray:
        seen.append(batch.copy())
        return batch

    grid = WindowGrid(shape=(3, 8, 8), patch_size=(8, 8, 8), step_size=0.5)
    assert grid.padding == ((2, 3), (0, 0), (0, 0))
    logits_of(np.ones((1, 3, 8, 8), dtype=np.float32), grid, FunctionBackend(network))
    assert seen[0][0, 0, :, 0, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_mirrored_answers_are_turned_back_and_averaged() -> None:
    """A network that adds the position along x: the mean over both directions is flat."""
    position = np.arange(8, dtype=np.float32)
    backend = FunctionBackend(lambda batch: batch + position)
    grid = WindowGrid(shape=(8, 8, 8), patch_size=(8, 8, 8), step_size=0.5)
    observed = []
    logits = logits_of(
        np.zeros((1, 8, 8, 8), dtype=np.float32),
        grid,
        backend,
        mirror_axes=(2,),
        observe_mirroring=lambda plain, mirrored, weights: observed.append((plain.copy(), mirrored, weights)),
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
    logits_of(np.zeros((1, 8, 8, 20), dtype=np.float32), grid, FunctionBackend(lambda b: b), advance=advance)
    assert count[0] == len(grid) == 4


def test_answers_that_are_not_finite_or_of_another_shape_fail() -> None:
    grid = WindowGrid(shape=(8, 8, 8), patch_size=(8, 8, 8), step_size=0.5)
    image = np.zeros((1, 8, 8, 8), dtype=np.float32)
    with pytest.raises(BackendFailed, match="not finite"):
        logits_of(image, grid, FunctionBackend(lambda batch: batch + np.float32(np.inf)))
    with pytest.raises(BackendFailed, match="where"):
        logits_of(image, grid, FunctionBackend(lambda batch: batch), labels=TWO)


@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_mirrored_passes_go_to_the_network_in_batches_of_its_size(batch: int) -> None:
    position = np.arange(8, dtype=np.float32)
    backend = FunctionBackend(lambda images: images + position, batch)
    grid = WindowGrid(shape=(8, 8, 12), patch_size=(8, 8, 8), step_size=0.5)
    logits = logits_of(ramp(1, 8, 8, 12), grid, backend, mirror_axes=(0, 1, 2))
    alone = logits_of(ramp(1, 8, 8, 12), grid, FunctionBackend(lambda images: images + position), mirror_axes=(0, 1, 2))
    np.testing.assert_array_equal(logits, alone)
    assert {sizes[0] for sizes in backend.batches} <= {min(batch, 8), 8 % batch}
    assert sum(sizes[0] for sizes in backend.batches) == 16


def noisy(heads: int, seed: int) -> FunctionBackend:
    """Answers with different logits for every place and window."""
    random = np.random.default_rng(seed)
    return FunctionBackend(
        lambda batch: (random.normal(size=(len(batch), heads, *batch.shape[2:])) * 3).astype(np.float32)
    )


MANY = LabelManager.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "c": 3}})
NESTED = LabelManager.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
)


@pytest.mark.parametrize("labels", [MANY, NESTED], ids=["labels", "regions"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shape", "patch", "target"),
    [
        ((23, 20, 21), (8, 8, 8), (31, 44, 27)),  # finer
        ((23, 20, 21), (8, 8, 8), (9, 11, 6)),  # coarser
        ((23, 20, 21), (8, 8, 8), (23, 20, 21)),
        ((5, 30, 9), (8, 8, 16), (7, 41, 12)),  # padded along two axes
        ((9, 5, 30), (8, 8, 8), (9, 9, 40)),  # padded along the rows
        ((6, 20, 21), (8, 16), (6, 33, 18)),  # 2D
    ],
)
def test_labels_of_a_stream_are_those_of_its_logits_as_a_whole(
    shape: tuple[int, int, int],
    patch: tuple[int, ...],
    target: tuple[int, int, int],
    labels: LabelManager,
    threads: int,
) -> None:
    image = np.zeros((1, *shape), dtype=np.float32)
    grid = WindowGrid(shape=shape, patch_size=patch, step_size=0.5)
    spacing = tuple(size / new for size, new in zip(shape, target, strict=True))
    whole = stored_logits(stream_of(image, grid, noisy(labels.num_heads, 1), noisy(labels.num_heads, 2), labels=labels))
    expected = segment([whole], target, spacing, labels)
    with RowThreads(threads) as pool:
        stream = stream_of(
            image, grid, noisy(labels.num_heads, 1), noisy(labels.num_heads, 2), labels=labels, threads=pool
        )
        found = label_image([stream], target, spacing, labels, pool)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert found.ties == expected.ties


def test_streams_on_grids_of_their_own_are_joined_plane_by_plane() -> None:
    fine, coarse = (24, 20, 21), (13, 11, 12)
    target, spacing = (24, 20, 21), (1.0, 1.0, 1.0)

    def streams() -> list[LogitStream]:
        grids = [WindowGrid(shape=shape, patch_size=(8, 8, 8), step_size=0.5) for shape in (fine, coarse)]
        return [
            stream_of(np.zeros((1, *grid.shape), dtype=np.float32), grid, noisy(4, seed), labels=MANY)
            for seed, grid in enumerate(grids)
        ]

    expected = segment([stored_logits(stream) for stream in streams()], target, spacing, MANY)
    with RowThreads(2) as threads:
        found = label_image(streams(), target, spacing, MANY, threads)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)


def test_each_network_s_labels_and_entropies_are_kept() -> None:
    shape = (9, 12, 17)
    grid = WindowGrid(shape=shape, patch_size=(8, 8, 8), step_size=0.5)
    stream = stream_of(np.zeros((1, *shape), dtype=np.float32), grid, noisy(4, 1), noisy(4, 2), labels=MANY)
    stored_logits(stream)
    for seed, maps in zip((1, 2), stream.certainties, strict=True):
        alone = stored_logits(
            stream_of(np.zeros((1, *shape), dtype=np.float32), grid, noisy(4, seed), labels=MANY)
        ).logits.astype(np.float32)
        assert (maps.winners == alone.argmax(axis=0)).mean() > 0.999  # but for what half precision does not tell apart
        probability = MANY.probabilities(alone).max(axis=0).clip(0.5)
        rest = np.maximum(1 - probability, 1e-30)
        bits = -(probability * np.log2(probability) + rest * np.log2(rest))
        np.testing.assert_allclose(maps.entropies[0] / 65535, bits, atol=5e-3)


def test_the_sums_can_be_kept_in_a_file(tmp_path: Path) -> None:
    shape = (23, 20, 21)
    grid = WindowGrid(shape=shape, patch_size=(8, 8, 8), step_size=0.5)
    image = np.zeros((1, *shape), dtype=np.float32)
    in_memory = logits_of(image, grid, noisy(4, 1), labels=MANY)
    in_file = logits_of(image, grid, noisy(4, 1), labels=MANY, folder=tmp_path)
    np.testing.assert_array_equal(in_memory, in_file)
    assert list(tmp_path.iterdir()) == []
