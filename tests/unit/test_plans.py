"""engine.plans: both formats, inheritance, and hostile content."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ImportRefused
from engine.plans import read_plans
from tests.support.peers import require_peer, shared_root

require_peer("torch")

from tests.support.nnunet_results import TWO_D, TrainedModel, plans_json  # noqa: E402 - needs torch

DOUBLING = TrainedModel(features=(4, 8, 8))


def test_new_format_is_read_in_network_order() -> None:
    plans = read_plans(plans_json(TrainedModel(), TWO_D))
    full, flat = plans.configurations["3d_fullres"], plans.configurations["2d"]
    assert full.patch_size == (8, 16, 16)
    assert full.spacing_mm == (3.0, 1.0, 1.0)
    assert full.normalization_schemes == ("ct",)
    assert full.resampling_data.order == 3
    assert full.resampling_seg.is_seg
    assert full.resampling_probabilities.function == "default"
    assert full.architecture.kernel_sizes[0] == (1, 3, 3)
    assert full.architecture.total_stride == (2, 4, 4)
    assert flat.is_2d
    assert flat.architecture.dimensions == 2
    assert plans.foreground_intensity_properties[0].percentile_99_5 == 200.0


@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_old_format_gives_the_same_configuration_as_the_new(network: str) -> None:
    model = TrainedModel(features=(4, 8, 8), network=network)
    new, old = read_plans(plans_json(model)), read_plans(plans_json(model, old=True))
    assert old.configurations["3d_fullres"] == new.configurations["3d_fullres"]


def test_old_name_of_the_intensity_properties_is_read() -> None:
    document = plans_json(TrainedModel())
    document["foreground_intensity_properties_by_modality"] = document.pop(
        "foreground_intensity_properties_per_channel"
    )
    assert read_plans(document).foreground_intensity_properties[0].mean == 80.0


def test_child_overrides_what_it_inherits_over_several_generations() -> None:
    document = plans_json(TrainedModel())
    document["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_fullres"}
    document["configurations"]["grandchild"] = {"inherits_from": "3d_cascade_fullres", "batch_size": 7}
    plans = read_plans(document)
    assert plans.configurations["grandchild"].previous_stage == "3d_fullres"
    assert plans.configurations["grandchild"].batch_size == 7
    assert plans.configurations["grandchild"].patch_size == (8, 16, 16)


def test_circle_of_inheritance_is_refused_with_its_members() -> None:
    document = plans_json(TrainedModel())
    document["configurations"]["a"] = {"inherits_from": "b"}
    document["configurations"]["b"] = {"inherits_from": "a"}
    with pytest.raises(ImportRefused, match="circle: a -> b -> a"):
        read_plans(document)


def test_unsupported_configuration_that_is_not_used_is_no_obstacle() -> None:
    document = plans_json(TrainedModel())
    document["configurations"]["mine"] = {"preprocessor_name": "MyPreprocessor"}
    assert list(read_plans(document, configurations=["3d_fullres"]).configurations) == ["3d_fullres"]
    with pytest.raises(ImportRefused, match="patch_size"):
        read_plans(document)


Edit = Callable[[dict[str, Any]], None]


def _set(*path: str | int, value: object) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return edit


FULL = ("configurations", "3d_fullres")
ARCH = (*FULL, "architecture")
KWARGS = (*ARCH, "arch_kwargs")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_set(*ARCH, "network_class_name", value="os.system"), "network_class_name"),
        (_set(*KWARGS, "conv_op", value="torch.nn.modules.conv.Conv2d"), "conv_op"),
        (_set(*KWARGS, "norm_op", value="torch.nn.BatchNorm3d"), "norm_op"),
        (_set(*KWARGS, "nonlin", value="builtins.exec"), "nonlin"),
        (_set(*KWARGS, "dropout_op", value="torch.nn.Dropout3d"), "dropout_op"),
        (_set(*KWARGS, "squeeze_excitation", value=True), "squeeze_excitation"),
        (_set(*KWARGS, "n_stages", value=10**9), "n_stages"),
        (_set(*KWARGS, "features_per_stage", value=[4, 10**30, 6]), r"features_per_stage\[1\]"),
        (_set(*KWARGS, "kernel_sizes", value=[[2, 3, 3]] * 3), "kernel_sizes"),
        (_set(*KWARGS, "strides", value=[[1, 1], [2, 2], [2, 2]]), "strides"),
        (_set(*KWARGS, "conv_bias", value="yes"), "conv_bias"),
        (_set(*FULL, "patch_size", value=[2048, 2048, 2048]), "patch_size"),
        (_set(*FULL, "patch_size", value=[9, 16, 16]), "patch_size"),
        (_set(*FULL, "patch_size", value=["8", 16, 16]), r"patch_size\[0\]"),
        (_set(*FULL, "spacing", value=[float("nan"), 1.0, 1.0]), r"spacing\[0\]"),
        (_set(*FULL, "spacing", value=[0.0, 1.0, 1.0]), r"spacing\[0\]"),
        (_set(*FULL, "normalization_schemes", value=["__import__"]), "normalization_schemes"),
        (_set(*FULL, "use_mask_for_norm", value=[True, False]), "use_mask_for_norm"),
        (_set(*FULL, "resampling_fn_data", value="my_resampling"), "resampling_fn_data"),
        (_set(*FULL, "resampling_fn_seg_kwargs", "is_seg", value=False), "is_seg"),
        (_set(*FULL, "preprocessor_name", value="MyPreprocessor"), "preprocessor_name"),
        (_set("transpose_forward", value=[0, 0, 1]), "transpose_forward"),
        (_set("transpose_forward", value=[1, 2, 0]), "transpose_backward"),
        (_set("image_reader_writer", value="MyReader"), "image_reader_writer"),
        (_set("label_manager", value="MyLabels"), "label_manager"),
        (_set("configurations", value=[]), "configurations"),
        (_set("foreground_intensity_properties_per_channel", value={"x": {}}), "channel index"),
        (_set("foreground_intensity_properties_per_channel", "0", "std", value=float("inf")), "std"),
    ],
)
def test_hostile_or_unsupported_content_is_refused_with_its_key(edit: Edit, named: str) -> None:
    document = copy.deepcopy(plans_json(TrainedModel()))
    edit(document)
    with pytest.raises(ImportRefused, match=named):
        read_plans(document)


@pytest.mark.parametrize(
    "content",
    [b"[1]", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["list", "torn", "nan", "twice", "bytes", "deep", "digits"],
)
def test_malformed_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plans.json").write_bytes(content)
    with pytest.raises(ImportRefused, match=r"plans\.json"):
        read_plans(tmp_path / "plans.json")


@pytest.mark.peer("shared-data")
def test_every_plans_file_of_the_reference_is_read() -> None:
    files = sorted(shared_root().glob("reference/plans/*/*lans.json"))
    assert len(files) > 10
    for file in files:
        listed = json.loads(file.read_text())["configurations"]
        plans = read_plans(file)
        assert set(plans.configurations) == set(listed)
        for configuration in plans.configurations.values():
            if configuration.previous_stage is not None:
                assert configuration.previous_stage in plans.configurations
