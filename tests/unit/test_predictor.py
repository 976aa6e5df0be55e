from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.errors import BundleInvalid, InputRejected, MemoryExceeded
from engine.manifest import Ensemble
from engine.memory import estimate_peak
from engine.predictor import Prediction, Predictor
from engine.volume import Geometry, Volume
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle
from tests.unit.test_volume import CODES, oblique

THREE_LABELS: dict[str, int | list[int]] = {"background": 0, "low": 1, "high": 2}
# Straight lines over the intensity v whose highest is: background below 10, low from 10 to 30, high above 30.
WEIGHTS, BIAS = np.array([[0], [1], [2]], dtype=np.float32), np.array([0, -10, -40], dtype=np.float32)


def threshold_bundle(root: Path, **options: Any) -> Bundle:
    """A model that labels intensities: 10 to 30 is 1, above 30 is 2."""
    patch = options.pop("patch", (8, 8, 8))
    spacing = options.pop("spacing", (1.0,) * len(patch))
    configuration = "2d" if len(patch) == 2 else "3d_fullres"
    for fold in range(options.pop("folds", 1)):
        # Each fold has a limit of its own, 4 apart.
        write_pointwise_network(
            root / configuration / f"fold_{fold}.onnx", WEIGHTS, BIAS - np.array([0, 4 * fold, 4 * fold]), patch,
            ramp_axis=options.get("ramp_axis"),
        )  # fmt: skip
    options.pop("ramp_axis", None)
    return write_tiny_bundle(
        root,
        labels=options.pop("labels", THREE_LABELS),
        configurations={configuration: configuration_json(patch, spacing)},
        **options,
    )


def expected(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.select([array > 30, array > 10], [2, 1], 0).astype(np.uint8)


def scene(shape: tuple[int, int, int] = (9, 11, 13), geometry: Geometry | None = None) -> Volume:
    """Intensities from 0 to 45 without a border of zeros, none near a limit."""
    array = np.random.default_rng(1).integers(0, 10, size=(1, *shape)).astype(np.float32) * 5 + 2
    return Volume(array=array, geometry=geometry or Geometry(shape=shape, affine_lps=np.eye(4)))


def predict(bundle: Bundle, volume: Volume, **options: Any) -> Prediction:
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        return predictor.predict(volume, **options)


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (8, 8)])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_each_voxel_gets_its_label_whatever_patch_and_transpose(
    tmp_path: Path, patch: tuple[int, ...], transpose: tuple[int, int, int]
) -> None:
    volume = scene()
    result = predict(threshold_bundle(tmp_path, patch=patch, transpose_forward=transpose), volume)
    np.testing.assert_array_equal(result.labels.array, expected(volume.array[0]))
    assert result.labels.geometry is volume.geometry
    assert result.labels.array.dtype == np.uint8


@pytest.mark.parametrize("code", CODES)
def test_the_network_sees_the_orientation_of_the_contract_and_labels_come_back_on_the_source_grid(
    tmp_path: Path, code: str
) -> None:
    """The network's answer depends on the direction of its x axis: only one orientation gives the right side."""
    bundle = threshold_bundle(
        tmp_path,
        labels={"background": 0, "left": 1},
        orientation="LPS",
        patch=(8, 8, 8),
    )
    write_pointwise_network(
        tmp_path / "3d_fullres" / "fold_0.onnx",
        np.zeros((2, 1), dtype=np.float32),
        np.array([3.5, 0.0], dtype=np.float32),
        (8, 8, 8),
        ramp_axis=2,
    )
    grid = Geometry(shape=(8, 8, 8), affine_lps=np.diag([1.0, 1.0, 1.0, 1.0]))
    volume, _ = Volume(array=np.ones((1, 8, 8, 8), dtype=np.float32), geometry=grid).reoriented(code)
    result = predict(bundle, volume)
    assert result.labels.geometry is volume.geometry
    indices = np.argwhere(result.labels.array == 1)[:, ::-1]
    positions = indices @ volume.geometry.affine_lps[:3, :3].T + volume.geometry.affine_lps[:3, 3]
    assert len(indices) == 4 * 64
    assert positions[:, 0].min() == 4.0  # the four columns furthest to the patient's left, in every storage order


def test_zeros_around_the_image_are_cropped_and_come_back_as_background(tmp_path: Path) -> None:
    volume = scene((20, 20, 20))
    volume.array[:, :6] = 0
    volume.array[:, :, 15:] = 0
    result = predict(threshold_bundle(tmp_path), volume)
    np.testing.assert_array_equal(result.labels.array, expected(volume.array[0]))


def test_an_oblique_anisotropic_image_is_resampled_and_comes_back_on_its_grid(tmp_path: Path) -> None:
    geometry = Geometry(shape=(12, 24, 30), affine_lps=oblique().affine_lps)
    array = np.full((1, 12, 24, 30), 2.0, dtype=np.float32)
    array[:, 3:9, 6:18, 5:25] = 20.0
    result = predict(threshold_bundle(tmp_path, spacing=(1.5, 1.5, 1.5)), Volume(array=array, geometry=geometry))
    truth = array[0] == 20
    found = result.labels.array == 1
    assert result.labels.geometry is geometry
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.9
    assert result.segments[0].volume_ml == pytest.approx(found.sum() * geometry.voxel_volume_ml)


def test_the_mean_over_folds_decides_and_their_disagreement_is_told(tmp_path: Path) -> None:
    bundle = threshold_bundle(tmp_path, folds=2)
    array = np.full((1, 8, 8, 8), 5.0, dtype=np.float32)
    array[:, :4] = 13.0  # fold 0 says 1 above 10, fold 1 above 14, their mean above 12
    array[:, 0] = 25.0
    volume = Volume(array=array, geometry=Geometry(shape=(8, 8, 8), affine_lps=np.eye(4)))
    both = predict(bundle, volume)
    assert both.segments[0].voxels == 4 * 64
    assert both.segments[0].fold_dice == pytest.approx(2 * 64 / (4 * 64 + 64))
    assert both.segments[1].fold_dice is None  # in neither fold
    assert predict(bundle, volume, folds=["1"]).segments[0].voxels == 64
    assert predict(bundle, volume, folds=["0"]).segments[0].fold_dice is None


@pytest.mark.requirement("ART-16")
@pytest.mark.parametrize("ensemble", ["probabilities", "probabilities-of-folds"])
def test_the_entropy_at_the_border_is_each_network_s_own_and_their_mean(tmp_path: Path, ensemble: Ensemble) -> None:
    """So that a result of many networks is seen as one network's is, and compared with what one was worth."""
    bundle = threshold_bundle(tmp_path, folds=2, ensemble=ensemble)
    array = np.full((1, 8, 8, 8), 5.0, dtype=np.float32)
    array[:, :4] = 17.0
    volume = Volume(array=array, geometry=Geometry(shape=(8, 8, 8), affine_lps=np.eye(4)))

    def entropy(limit: float) -> float:
        p = 1 / (1 + np.exp(limit - 17) + np.exp(17 - 30))
        return float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))

    alone = [predict(bundle, volume, folds=[fold]).segments[0].border_entropy for fold in ("0", "1")]
    assert alone == [pytest.approx(entropy(10), rel=1e-3), pytest.approx(entropy(14), rel=1e-3)]
    both = predict(bundle, volume).segments
    assert both[0].border_entropy == pytest.approx((entropy(10) + entropy(14)) / 2, rel=1e-3)
    assert both[1].border_entropy is None
    # In and around the segment, also each network's own: of 4 planes inside and 2 beside them.
    unsure = [predict(bundle, volume, folds=[fold]).segments[0].dilated_entropy for fold in ("0", "1")]
    assert None not in unsure
    assert both[0].dilated_entropy == pytest.approx(sum(value or 0.0 for value in unsure) / 2, rel=1e-6)
    assert both[1].dilated_entropy is None


@pytest.mark.requirement("ART-11")
@pytest.mark.parametrize(("ensemble", "voxels"), [("probabilities", 512), ("probabilities-of-folds", 0)])
def test_folds_are_joined_by_their_logits_or_by_their_probabilities_as_the_bundle_says(
    tmp_path: Path, ensemble: Ensemble, voxels: int
) -> None:
    # One fold is sure of label 1, two lean to the background: 10, -2 and -2 are 2 in the mean of the logits, and
    # 1.00, 0.12 and 0.12 are 0.41 in the mean of the probabilities.
    for fold, logit in enumerate((10, -2, -2)):
        bias = np.array([0, logit, -50], dtype=np.float32)
        write_pointwise_network(tmp_path / "3d_fullres" / f"fold_{fold}.onnx", 0 * WEIGHTS, bias, (8, 8, 8))
    bundle = write_tiny_bundle(
        tmp_path,
        labels=THREE_LABELS,
        configurations={"3d_fullres": configuration_json((8, 8, 8), (1.0, 1.0, 1.0))},
        ensemble=ensemble,
    )
    array = np.full((1, 8, 8, 8), 5.0, dtype=np.float32)
    found = predict(bundle, Volume(array=array, geometry=Geometry(shape=(8, 8, 8), affine_lps=np.eye(4))))
    assert found.segments[0].voxels == voxels


def test_mirroring_is_the_models_and_can_be_switched_off(tmp_path: Path) -> None:
    labels: dict[str, int | list[int]] = {"background": 0, "one": 1}
    bundle = threshold_bundle(tmp_path, labels=labels, mirror_axes=(2,))
    write_pointwise_network(
        tmp_path / "3d_fullres" / "fold_0.onnx",
        np.zeros((2, 1), dtype=np.float32),
        np.array([3.0, 0.0], dtype=np.float32),
        (8, 8, 8),
        ramp_axis=2,
    )
    volume = Volume(array=np.ones((1, 8, 8, 8), dtype=np.float32), geometry=scene((8, 8, 8)).geometry)
    mirrored = predict(bundle, volume)
    assert mirrored.segments[0].voxels == 512  # the mean over both directions is 3.5 everywhere
    assert mirrored.segments[0].mirror_dice is not None
    assert mirrored.segments[0].mirror_dice < 0.7
    plain = predict(bundle, volume, mirroring=False)
    assert plain.segments[0].voxels == 4 * 64
    assert plain.segments[0].mirror_dice is None


def test_confidence_is_the_probability_of_the_winning_label(tmp_path: Path) -> None:
    volume = Volume(array=np.full((1, 8, 8, 8), 11.0, dtype=np.float32), geometry=scene((8, 8, 8)).geometry)
    result = predict(threshold_bundle(tmp_path), volume)
    logits = WEIGHTS[:, 0] * 11 + BIAS
    assert result.segments[0].confidence == pytest.approx(np.exp(logits[1]) / np.exp(logits).sum(), abs=1e-3)
    assert result.segments[1].confidence is None
    assert result.mean_confidence == result.segments[0].confidence
    assert result.segments[0].mean_intensity == pytest.approx((11.0,))


def test_regions_overlap_in_the_statistics(tmp_path: Path) -> None:
    """whole is above 10, core above 30."""
    write_pointwise_network(
        tmp_path / "3d_fullres" / "fold_0.onnx",
        np.array([[1], [1]], dtype=np.float32),
        np.array([-10, -30], dtype=np.float32),
        (8, 8, 8),
    )
    bundle = write_tiny_bundle(
        tmp_path,
        labels={"background": 0, "whole": [1, 2], "core": [2]},
        regions_class_order=(1, 2),
        configurations={"3d_fullres": configuration_json((8, 8, 8), (1, 1, 1))},
    )
    volume = scene()
    result = predict(bundle, volume)
    np.testing.assert_array_equal(result.labels.array, expected(volume.array[0]))
    whole, core = result.segments
    assert whole.voxels == int((volume.array > 10).sum())
    assert core.voxels == int((volume.array > 30).sum())
    inside = volume.array[volume.array > 10].astype(np.float64)
    assert whole.confidence == pytest.approx(float((1 / (1 + np.exp(10 - inside))).mean()), abs=1e-3)


def test_a_cascade_sees_the_labels_of_its_first_stage(tmp_path: Path) -> None:
    write_pointwise_network(tmp_path / "3d_lowres" / "fold_0.onnx", WEIGHTS, BIAS, (8, 8, 8))
    # Ignores the image; answers the one-hot channels in exchanged order, at twice the resolution.
    swapped = np.array([[0, 0, 0], [0, 0, 9], [0, 9, 0]], dtype=np.float32)
    write_pointwise_network(
        tmp_path / "3d_cascade_fullres" / "fold_0.onnx", swapped, np.array([4, 0, 0], dtype=np.float32), (8, 8, 8)
    )
    bundle = write_tiny_bundle(
        tmp_path,
        labels=THREE_LABELS,
        configurations={
            "3d_lowres": configuration_json((8, 8, 8), (1, 1, 1)),
            "3d_cascade_fullres": configuration_json((8, 8, 8), (0.5, 0.5, 0.5), previous_stage="3d_lowres"),
        },
    )
    array = np.full((1, 8, 10, 12), 5.0, dtype=np.float32)
    array[:, 2:6, 2:8, 2:6], array[:, 2:6, 2:8, 6:10] = 20.0, 40.0
    volume = Volume(array=array, geometry=Geometry(shape=(8, 10, 12), affine_lps=np.eye(4)))
    fractions: list[float] = []
    result = predict(bundle, volume, progress=fractions.append)
    swap = np.array([0, 2, 1], dtype=np.uint8)
    first = predict(bundle, volume, configurations=["3d_lowres"])
    np.testing.assert_array_equal(first.labels.array, expected(array[0]))
    # The corners of the boxes may be rounded off by half a voxel at the doubled resolution.
    assert (result.labels.array != swap[first.labels.array]).mean() < 0.02
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_several_channels_and_several_configurations_are_joined(tmp_path: Path) -> None:
    """2d answers channel 0, 3d channel 1; their probabilities are averaged."""
    configurations = {
        "2d": configuration_json((8, 8), (1, 1), schemes=["NoNormalization"] * 2),
        "3d_fullres": configuration_json((8, 8, 8), (1, 1, 1), schemes=["NoNormalization"] * 2),
    }
    for name, weights in (("2d", [[0, 0], [1, 0]]), ("3d_fullres", [[0, 0], [0, 1]])):
        patch = configurations[name]["patch_size"]
        write_pointwise_network(
            tmp_path / name / "fold_0.onnx", np.array(weights, dtype=np.float32), np.zeros(2, dtype=np.float32), patch
        )
    bundle = write_tiny_bundle(tmp_path, labels={"background": 0, "one": 1}, configurations=configurations, channels=2)
    array = np.zeros((2, 8, 8, 8), dtype=np.float32)
    array[0], array[1] = -1.0, -1.0
    array[:, :4] = np.array([6.0, -2.0], dtype=np.float32).reshape(2, 1, 1, 1)  # sigmoids 0.9975 and 0.119
    array[:, 6:] = np.array([0.5, -8.0], dtype=np.float32).reshape(2, 1, 1, 1)  # sigmoids 0.62 and 0.0003
    volume = Volume(array=array, geometry=scene((8, 8, 8)).geometry)
    result = predict(bundle, volume)
    assert result.labels.array[:4].all()
    assert not result.labels.array[4:].any()
    assert predict(bundle, volume, configurations=["2d"]).labels.array[6:].all()


def test_postprocessing_is_applied_before_anything_is_measured(tmp_path: Path) -> None:
    bundle = threshold_bundle(
        tmp_path,
        postprocessing={
            "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
            "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}],
        },
    )
    array = np.full((1, 8, 8, 8), 5.0, dtype=np.float32)
    array[:, 2:5, 2:5, 2:5] = 20.0
    array[:, 7, 7, 7] = 20.0
    result = predict(bundle, Volume(array=array, geometry=scene((8, 8, 8)).geometry))
    assert result.segments[0].voxels == 27
    assert result.segments[0].components == 1
    assert result.segments[0].touches_border == ()


def test_what_was_used_is_recorded(tmp_path: Path) -> None:
    result = predict(threshold_bundle(tmp_path), scene())
    assert (result.runtime.backend, result.runtime.provider) == ("onnxruntime", "cpu")
    assert (result.runtime.precision, result.runtime.threads) == ("float32", 1)
    assert {"onnxruntime", "numpy", "scipy"} == set(result.runtime.versions)
    assert set(result.runtime.seconds) == {"preprocess", "network", "export", "statistics"}
    assert result.runtime.peak_estimate_bytes > 0


@pytest.mark.requirement("INF-34", open="a smaller batch of windows, a CPU in place of a GPU")
def test_an_image_that_does_not_fit_is_refused_with_both_numbers_before_a_window_runs(tmp_path: Path) -> None:
    fractions: list[float] = []
    with pytest.raises(MemoryExceeded, match=r"needs about \d+ MiB and 10 MiB may be used"):
        predict(threshold_bundle(tmp_path), scene(), budget_bytes=10 * 2**20, progress=fractions.append)
    assert fractions == []


@pytest.mark.requirement("INF-34", open="a smaller batch of windows, a CPU in place of a GPU")
def test_where_memory_is_short_the_sums_go_to_a_file_and_the_labels_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("engine.predictor._log.warning", lambda text, *values: said.append(text % values))
    bundle, volume, scratch = threshold_bundle(tmp_path / "model", folds=9), scene((40, 90, 90)), tmp_path / "scratch"
    scratch.mkdir()
    needed = estimate_peak(bundle, volume.geometry)
    less = estimate_peak(bundle, volume.geometry, sums_in_file=True)
    budget = (needed.bytes + less.bytes) // 2
    with pytest.raises(MemoryExceeded):
        predict(bundle, volume, budget_bytes=budget)
    with Predictor(bundle, device="cpu", threads=1, scratch=scratch) as predictor:
        predictor.check_memory(volume.geometry, budget_bytes=budget + volume.array.nbytes)
        found = predictor.predict(volume, budget_bytes=budget)
        with pytest.raises(MemoryExceeded):
            predictor.predict(volume, budget_bytes=less.bytes - 1)
    assert ["kept in a file" in text for text in said] == [True, True]  # where it was asked, and where it was done
    assert found.runtime.peak_estimate_bytes == less.bytes
    np.testing.assert_array_equal(found.labels.array, predict(bundle, volume).labels.array)
    assert list(scratch.iterdir()) == []


def test_a_disk_without_room_for_the_sums_refuses_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, volume = threshold_bundle(tmp_path / "model", folds=9), scene((40, 90, 90))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("engine.logit_rows.os.posix_fallocate", full)
    budget = estimate_peak(bundle, volume.geometry, sums_in_file=True).bytes
    with (
        Predictor(bundle, device="cpu", threads=1, scratch=tmp_path) as predictor,
        pytest.raises(MemoryExceeded, match="No space left on device; free memory or space there"),
    ):
        predictor.predict(volume, budget_bytes=budget)


def test_an_image_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    bundle = threshold_bundle(tmp_path)
    two = Volume(array=np.ones((2, 8, 8, 8), dtype=np.float32), geometry=scene((8, 8, 8)).geometry)
    with pytest.raises(InputRejected, match=r"2 channel\(s\); tiny takes 1"):
        predict(bundle, two)
    broken = scene()
    broken.array[0, 1, 1, 1] = np.nan
    with pytest.raises(InputRejected, match="NaN"):
        predict(bundle, broken)


def test_an_unknown_fold_or_configuration_is_named(tmp_path: Path) -> None:
    bundle = threshold_bundle(tmp_path)
    with pytest.raises(BundleInvalid, match="none of the folds asked for; it has 0"):
        predict(bundle, scene(), folds=["7"])
    with pytest.raises(BundleInvalid, match="3d_lowres"):
        predict(bundle, scene(), configurations=["3d_lowres"])


def test_a_bundle_whose_network_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    bundle = threshold_bundle(tmp_path)
    write_pointwise_network(tmp_path / "3d_fullres" / "fold_0.onnx", WEIGHTS, BIAS, (4, 4, 4))
    with pytest.raises(BundleInvalid, match="the plans say"):
        Predictor(bundle, device="cpu")
