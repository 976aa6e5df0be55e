"""All classes: probabilities that a test can work out by hand, and the labels that follow from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.class_probabilities import ProbabilityPredictor
from engine.errors import InputRejected, MemoryExceeded
from engine.predictor import Predictor
from engine.volume import Geometry, Volume
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle
from tests.unit.test_predictor import BIAS, THREE_LABELS, WEIGHTS, expected, threshold_bundle


def image(shape: tuple[int, int, int] = (6, 10, 9), spacing: float = 1.0) -> Volume:
    array = np.random.default_rng(1).uniform(1, 50, (1, *shape)).astype(np.float32)
    return Volume(array=array, geometry=Geometry(shape=shape, affine_lps=np.diag([spacing, spacing, spacing, 1.0])))


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(logits - logits.max(axis=0))
    shares: NDArray[np.float64] = raised / raised.sum(axis=0)
    return shares


def test_probabilities_are_the_softmax_of_the_logits_and_labels_their_highest(tmp_path: Path) -> None:
    volume = image()
    predictor = ProbabilityPredictor(threshold_bundle(tmp_path), device="cpu", threads=1)
    shares: list[float] = []
    found = predictor.predict(volume, progress=shares.append)
    predictor.close()
    logits = WEIGHTS[:, 0, None, None, None] * volume.array + BIAS[:, None, None, None]
    np.testing.assert_allclose(found.probabilities, softmax(logits.astype(np.float64)), atol=0.02)  # half precision
    np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-5)
    clear = (np.abs(volume.array[0] - 10) > 0.1) & (np.abs(volume.array[0] - 30) > 0.1)
    np.testing.assert_array_equal(found.labels.array[clear], expected(volume.array[0])[clear])
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert [s.voxels for s in found.segments] == [int((found.labels.array == value).sum()) for value in (1, 2)]


def test_outside_of_what_is_nonzero_the_background_is_certain(tmp_path: Path) -> None:
    volume = image()
    volume.array[:, :2] = 0
    predictor = ProbabilityPredictor(threshold_bundle(tmp_path), device="cpu")
    found = predictor.predict(volume)
    predictor.close()
    assert (found.probabilities[0, :2] == 1).all()
    assert (found.probabilities[1:, :2] == 0).all()
    assert found.properties["bbox_used_for_cropping"] == [[2, 6], [0, 10], [0, 9]]
    assert found.properties["shape_before_cropping"] == [6, 10, 9]


@pytest.mark.parametrize("folds", [1, 2])
def test_the_labels_are_those_of_the_predictor_where_the_network_has_another_grid(tmp_path: Path, folds: int) -> None:
    bundle = threshold_bundle(tmp_path, spacing=(1.7, 1.3, 1.3), folds=folds)
    volume = image((12, 20, 18))
    with Predictor(bundle, device="cpu") as labels:
        wanted = labels.predict(volume).labels.array
    predictor = ProbabilityPredictor(bundle, device="cpu")
    found = predictor.predict(volume)
    predictor.close()
    assert (found.labels.array != wanted).mean() < 1e-3
    assert found.probabilities.shape == (3, 12, 20, 18)


def test_probabilities_come_back_in_the_order_of_the_image(tmp_path: Path) -> None:
    """The model sees RAS, transposed; the image is stored as LPS."""
    bundle = threshold_bundle(tmp_path, orientation="RAS", transpose_forward=(1, 2, 0))
    volume = image()
    predictor = ProbabilityPredictor(bundle, device="cpu")
    found = predictor.predict(volume)
    predictor.close()
    np.testing.assert_array_equal(found.labels.array, found.probabilities.argmax(axis=0))
    logits = WEIGHTS[:, 0, None, None, None] * volume.array + BIAS[:, None, None, None]
    np.testing.assert_allclose(found.probabilities, softmax(logits.astype(np.float64)), atol=0.02)


def test_too_many_classes_for_the_memory_are_refused_with_the_numbers(tmp_path: Path) -> None:
    predictor = ProbabilityPredictor(threshold_bundle(tmp_path), device="cpu")
    with pytest.raises(MemoryExceeded, match=r"all 3 classes need about \d+ MiB and 1 MiB may be used"):
        predictor.check_memory(image((64, 64, 64)).geometry, budget_bytes=2**20)
    predictor.close()


def test_a_wrong_number_of_channels_is_refused(tmp_path: Path) -> None:
    predictor = ProbabilityPredictor(threshold_bundle(tmp_path), device="cpu")
    volume = image()
    two = Volume(array=np.concatenate([volume.array, volume.array]), geometry=volume.geometry)
    with pytest.raises(InputRejected, match=r"2 channel\(s\)"):
        predictor.predict(two)
    predictor.close()


def test_regions_have_a_probability_each_and_none_outside_of_what_is_nonzero(tmp_path: Path) -> None:
    """whole is above 10, core above 30."""
    bias = np.array([-10, -30], dtype=np.float32)
    write_pointwise_network(tmp_path / "3d_fullres" / "fold_0.onnx", np.ones((2, 1), np.float32), bias, (8, 8, 8))
    bundle = write_tiny_bundle(
        tmp_path,
        labels={"background": 0, "whole": [1, 2], "core": [2]},
        regions_class_order=(1, 2),
        configurations={"3d_fullres": configuration_json((8, 8, 8), (1, 1, 1))},
    )
    volume = image()
    volume.array[:, :2] = 0
    predictor = ProbabilityPredictor(bundle, device="cpu")
    found = predictor.predict(volume)
    predictor.close()
    assert not found.probabilities[:, :2].any()
    inside = volume.array[0, 2:].astype(np.float64)
    for head, limit in enumerate((10, 30)):
        np.testing.assert_allclose(found.probabilities[head, 2:], 1 / (1 + np.exp(limit - inside)), atol=0.02)
    np.testing.assert_array_equal(found.labels.array > 0, found.probabilities[0] > 0.5)


def test_a_cascade_is_run_on_the_labels_of_its_first_stage(tmp_path: Path) -> None:
    """The second stage answers the first one's labels in exchanged order; the first one can be asked for alone."""
    write_pointwise_network(tmp_path / "3d_lowres" / "fold_0.onnx", WEIGHTS, BIAS, (8, 8, 8))
    swapped = np.array([[0, 0, 0], [0, 0, 9], [0, 9, 0]], dtype=np.float32)
    second = tmp_path / "3d_cascade_fullres" / "fold_0.onnx"
    write_pointwise_network(second, swapped, np.array([4, 0, 0], dtype=np.float32), (8, 8, 8))
    bundle = write_tiny_bundle(
        tmp_path,
        labels=THREE_LABELS,
        orientation="RAS",
        transpose_forward=(2, 0, 1),
        configurations={
            "3d_lowres": configuration_json((8, 8, 8), (1, 1, 1)),
            "3d_cascade_fullres": configuration_json((8, 8, 8), (1, 1, 1), previous_stage="3d_lowres"),
        },
    )
    volume = image()
    found = {}
    for name in ("3d_lowres", "3d_cascade_fullres"):
        predictor = ProbabilityPredictor(bundle, configurations=[name], device="cpu")
        found[name] = predictor.predict(volume).labels.array
        predictor.close()
    np.testing.assert_array_equal(found["3d_cascade_fullres"], np.array([0, 2, 1])[found["3d_lowres"]])
    assert set(np.unique(found["3d_lowres"])) == {0, 1, 2}
