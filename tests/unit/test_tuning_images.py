"""engine.tuning_images: windows as the networks see them, and cases, small ones first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.bundle_networks import network_of
from engine.sanity_phantom import make_phantom
from engine.tuning_images import tuning_cases, tuning_windows
from tests.support.execution_plans import brightness_bundle
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle


def test_each_configuration_gets_a_window_of_its_patch_with_what_the_stage_before_found(tmp_path: Path) -> None:
    weights, bias = np.ones((3, 1), dtype=np.float32), np.zeros(3, dtype=np.float32)
    write_pointwise_network(tmp_path / "2d" / "fold_0.onnx", weights, bias, (6, 10))
    write_pointwise_network(tmp_path / "3d_lowres" / "fold_0.onnx", weights, bias, (4, 8, 8))
    write_pointwise_network(
        tmp_path / "3d_cascade" / "fold_0.onnx", np.ones((3, 3), dtype=np.float32), bias, (8, 8, 12)
    )
    bundle = write_tiny_bundle(
        tmp_path,
        labels={"background": 0, "a": 1, "b": 2},
        configurations={
            "2d": configuration_json((6, 10), (1.0, 1.0)),
            "3d_lowres": configuration_json((4, 8, 8), (2.0, 2.0, 2.0)),
            "3d_cascade": configuration_json((8, 8, 12), (1.0, 1.0, 1.0), previous_stage="3d_lowres"),
        },
        transpose_forward=(2, 0, 1),
    )
    windows = tuning_windows(bundle)
    for configuration in bundle.configurations:
        network = network_of(bundle, configuration, configuration.folds[0])
        window = windows[configuration.name]
        assert window.shape == (1, network.channels, *network.patch_size)
        assert window.dtype == np.float32
        assert np.ptp(window[0, 0]) > 0  # an image, not what it was padded with
    assert not windows["3d_cascade"][0, 1:].any()


def test_cases_are_the_sanity_cases_and_those_added_and_small_ones_come_first(tmp_path: Path) -> None:
    bundle = brightness_bundle(tmp_path / "b", sanity=True)
    assert bundle.evidence.sanity is not None
    phantom = bundle.evidence.sanity.cases[0].phantom
    assert phantom is not None
    cases = tuning_cases(bundle, [("added-1", make_phantom(phantom))])
    sizes = [case.volume.array.size for case in cases]
    assert sizes == sorted(sizes)
    assert {case.name: case.expected is None for case in cases} == {
        "added-1": True,
        "plans-grid": False,
        "thick-slices": False,
        "turned": False,
    }
    assert all(c.expected is None for c in tuning_cases(brightness_bundle(tmp_path / "c")))
