"""engine.planning: nnU-Net's plans, key by key; the article's configurations; guards where nnU-Net has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.dataset import DatasetJson, read_dataset_json
from engine.errors import DatasetInvalid
from engine.fingerprint import Fingerprint, IntensityStatistics, read_fingerprint
from engine.labels import LabelManager
from engine.planners import PLANNERS, PlannerName
from engine.planning import Planned, PlanRequest, plan_experiment, write_plans
from engine.plans import read_plans
from tests.support.peers import shared_root

Triple = tuple[float, float, float]

OF_PLANS: dict[str, PlannerName] = {planner.plans_name: name for name, planner in PLANNERS.items()}
STATISTICS = IntensityStatistics(
    max=100.0, mean=50.0, median=50.0, min=0.0, percentile_00_5=1.0, percentile_99_5=99.0, std=20.0
)


def _dataset(cases: int, labels: int, channels: tuple[str, ...] = ("CT",)) -> DatasetJson:
    document = {"labels": {"background": 0, **{f"label {i}": i for i in range(1, labels)}}}
    return DatasetJson(
        document=document,
        channel_names=channels,
        labels=LabelManager.from_dataset_json(document),
        num_training=cases,
        file_ending=".nii.gz",
        image_reader_writer="SimpleITKIO",
        patients={},
    )


def _plan(
    spacing: Triple,
    shape: tuple[int, int, int],
    cases: int = 20,
    labels: int = 3,
    channels: tuple[str, ...] = ("CT",),
    cropped: float = 1.0,
    **options: Any,
) -> Planned:
    fingerprint = Fingerprint(
        spacings=(spacing,) * 3,
        shapes_after_crop=(shape,) * 3,
        intensities=(STATISTICS,) * len(channels),
        median_relative_size_after_cropping=cropped,
    )
    dataset = _dataset(cases, labels, channels)
    return plan_experiment(
        PlanRequest(dataset_name="Dataset001_Test", dataset_json=dataset, fingerprint=fingerprint, **options)
    )


def _reference_plans() -> list[Path]:
    try:
        return sorted(shared_root().glob("reference/plans/*/*lans.json"))
    except pytest.skip.Exception:
        return []


@pytest.mark.requirement("ART-05")
@pytest.mark.requirement("ART-06", open="a probe on a GPU")
@pytest.mark.peer("shared-data")
@pytest.mark.parametrize("file", _reference_plans(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_plans_are_nnunets_key_by_key(file: Path) -> None:
    wanted = json.loads(file.read_text())
    planned = plan_experiment(
        PlanRequest(
            dataset_name=wanted["dataset_name"],
            dataset_json=read_dataset_json(file.parent / "dataset.json"),
            fingerprint=read_fingerprint(file.parent / "dataset_fingerprint.json"),
            planner=OF_PLANS[file.stem],
        )
    )
    assert json.loads(json.dumps(planned.plans)) == wanted
    assert list(planned.plans["configurations"]) == list(wanted["configurations"])


@pytest.mark.peer("shared-data")
def test_the_reference_is_not_empty() -> None:
    assert len(_reference_plans()) == 22


# Spacing, median shape, cases, labels; patch and batch in 3D and 2D; low resolution: patch, batch.
GOLDEN: list[
    tuple[Triple, tuple[int, int, int], int, int, list[int], int, list[int], int, tuple[list[int], int] | None]
]
GOLDEN = [
    ((1, 1, 1), (36, 50, 35), 260, 3, [40, 56, 40], 9, [56, 40], 366, None),
    ((1, 0.7676, 0.7676), (482, 512, 512), 131, 3, [128] * 3, 2, [512] * 2, 12, ([128] * 3, 2)),
    ((3.6, 0.625, 0.625), (20, 320, 319), 32, 3, [20, 320, 256], 2, [320, 320], 32, None),
    ((1, 1, 1), (138, 169, 138), 484, 4, [128] * 3, 2, [192, 160], 105, None),
    ((1.37, 1.25, 1.25), (115, 320, 232), 20, 2, [80, 192, 160], 2, [320, 256], 40, None),
    ((1.6, 0.79, 0.79), (187, 512, 512), 41, 2, [64, 192, 160], 2, [512] * 2, 12, ([64, 192, 192], 2)),
    ((5, 1.5625, 1.5625), (18, 237, 208), 200, 4, [20, 256, 224], 4, [256, 224], 56, None),
]


@pytest.mark.requirement("ART-05")
@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: "x".join(map(str, row[1])))
def test_published_plans_are_reproduced(row: tuple[Any, ...]) -> None:
    spacing, shape, cases, labels, patch, batch, patch_2d, batch_2d, lowres = row
    made = _plan(spacing, shape, cases, labels).plans["configurations"]
    assert (made["3d_fullres"]["patch_size"], made["3d_fullres"]["batch_size"]) == (patch, batch)
    assert (made["2d"]["patch_size"], made["2d"]["batch_size"]) == (patch_2d, batch_2d)
    found = made.get("3d_lowres")
    assert (found and (found["patch_size"], found["batch_size"])) == lowres
    assert ("3d_cascade_fullres" in made) == (lowres is not None)


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
@pytest.mark.parametrize(
    ("planner", "patch"),
    [("ResEncM", [128, 128, 128]), ("ResEncL", [192, 192, 192]), ("ResEncXL", [224, 256, 224])],
)
def test_larger_residual_planners_take_larger_patches(planner: PlannerName, patch: list[int]) -> None:
    made = _plan((1, 0.7676, 0.7676), (482, 512, 512), 131, 3, planner=planner).plans
    full = made["configurations"]["3d_fullres"]
    assert full["patch_size"] == patch
    assert full["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert full["architecture"]["network_class_name"].endswith("ResidualEncoderUNet")
    assert (
        made["configurations"]["3d_lowres"]["data_identifier"] == f"nnUNet{planner[:6]}UNet{planner[6:]}Plans_3d_lowres"
    )


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
def test_more_gpu_memory_gives_a_larger_patch_and_too_little_is_an_error() -> None:
    small, large = (
        _plan((1, 1, 1), (300, 300, 300), gpu_memory_gb=gb).plans["configurations"]["3d_fullres"]["patch_size"]
        for gb in (8, 24)
    )
    assert small == [128, 128, 128]
    assert min(large) > 128
    with pytest.raises(DatasetInvalid, match=r"no patch fits into 0\.0001 GB"):
        _plan((1, 1, 1), (300, 300, 300), gpu_memory_gb=0.0001)


@pytest.mark.requirement("ART-03")
def test_normalization_follows_the_channel_and_the_mask_the_cropping() -> None:
    channels = ("ct", "T1", "noNorm", "rescale_to_0_1", "RGB_to_0_1", "zscore")
    made = _plan((1, 1, 1), (64, 64, 64), channels=channels, cropped=0.7).plans["configurations"]["3d_fullres"]
    assert made["normalization_schemes"] == [
        "CTNormalization",
        "ZScoreNormalization",
        "NoNormalization",
        "RescaleTo01Normalization",
        "RGBTo01Normalization",
        "ZScoreNormalization",
    ]
    assert made["use_mask_for_norm"] == [False, True, False, False, False, True]


@pytest.mark.requirement("ART-04", open="resampling itself")
def test_the_target_spacing_of_a_coarse_axis_is_a_low_percentile_but_not_finer_than_the_others() -> None:
    def target(coarse: list[float]) -> float:
        fingerprint = Fingerprint(
            spacings=tuple((z, 1.0, 1.0) for z in coarse),
            shapes_after_crop=((15, 200, 200),) * len(coarse),
            intensities=(STATISTICS,),
            median_relative_size_after_cropping=1.0,
        )
        request = PlanRequest(dataset_name="d", dataset_json=_dataset(9, 2), fingerprint=fingerprint)
        spacing: float = plan_experiment(request).plans["configurations"]["3d_fullres"]["spacing"][0]
        return spacing

    assert target([2.0, 5.0, 5.0, 5.0, 5.0, 5.0]) == pytest.approx(3.5)
    assert target([0.2, 0.3, 5.0, 5.0, 5.0, 5.0]) == 1.0 + 1e-5
    assert target([2.0, 2.5, 2.5]) == 2.5


def test_the_target_spacing_can_be_given_and_then_has_its_own_data() -> None:
    made = _plan((1, 1, 2), (100, 100, 50), overwrite_target_spacing=(1.0, 1.5, 1.0), planner="ResEncM").plans
    full = made["configurations"]["3d_fullres"]
    assert made["transpose_forward"] == [1, 0, 2]
    assert made["transpose_backward"] == [1, 0, 2]
    assert full["spacing"] == [1.5, 1.0, 1.0]
    assert full["median_image_size_in_voxels"] == [67.0, 100.0, 100.0]
    assert full["data_identifier"] == "nnUNetResEncUNetMPlans_3d_fullres"


@pytest.mark.requirement("ART-05")
def test_profile_article_makes_a_low_resolution_at_half_the_resolution_below_90_percent() -> None:
    # The patch covers half of the image: nnU-Net's rule asks for less than a quarter.
    spacing, shape = (1.0, 1.0, 1.0), (160, 160, 160)
    assert "3d_lowres" not in _plan(spacing, shape).plans["configurations"]
    planned = _plan(spacing, shape, profile="article")
    made = planned.plans["configurations"]
    assert list(made) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert made["3d_lowres"]["spacing"] == [2.0, 2.0, 2.0]
    assert made["3d_lowres"]["median_image_size_in_voxels"] == [80, 80, 80]
    assert made["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    assert made["3d_fullres"]["batch_dice"] is True
    assert made["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert made["3d_lowres"]["data_identifier"] == "nnUNetArticlePlans_3d_lowres"
    assert planned.plans["plans_name"] == "nnUNetArticlePlans"
    assert planned.plans["profile"] == "article"


@pytest.mark.requirement("ART-05")
def test_profile_article_has_no_low_resolution_where_the_patch_covers_90_percent() -> None:
    made = _plan((1, 1, 1), (100, 100, 100), profile="article").plans["configurations"]
    assert list(made) == ["2d", "3d_fullres"]
    assert made["3d_fullres"]["batch_dice"] is False


@pytest.mark.requirement("ART-05")
def test_profile_article_leaves_out_a_full_resolution_whose_patch_is_not_above_16_cubed() -> None:
    planned = _plan((1, 1, 1), (16, 16, 16), profile="article")
    assert list(planned.plans["configurations"]) == ["2d"]
    assert any("4096" in note for note in planned.notes)
    assert "3d_fullres" in _plan((1, 1, 1), (16, 16, 17), profile="article").plans["configurations"]


def test_single_slices_are_planned_in_2d_only() -> None:
    assert list(_plan((999.0, 1.0, 1.0), (1, 200, 300)).plans["configurations"]) == ["2d"]


def test_an_image_too_small_for_any_network_is_an_error_with_its_size() -> None:
    with pytest.raises(DatasetInvalid, match="too small for any U-Net"):
        _plan((1, 1, 1), (7, 7, 7))


def test_a_network_that_cannot_pool_is_left_out_with_a_note() -> None:
    planned = _plan((1.0, 1.0, 1.0), (12, 7, 7))
    assert list(planned.plans["configurations"]) == ["3d_fullres"]
    assert any(note.startswith("2d is left out: [7.0, 7.0] voxels") for note in planned.notes)


def test_two_stages_are_planned_with_a_note() -> None:
    planned = _plan((1, 1, 1), (10, 10, 10))
    assert planned.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"] == 2
    assert any("two stages" in note for note in planned.notes)


def test_mixed_data_thinner_than_a_voxel_at_the_target_spacing_is_planned_as_2d() -> None:
    """nnU-Net divides by an estimate of 0 here."""
    fingerprint = Fingerprint(
        spacings=((10.0, 1.0, 1.0), (0.4, 1.0, 1.0), (10.0, 1.0, 1.0), (0.4, 1.0, 1.0), (0.4, 1.0, 1.0), (10.0, 1, 1)),
        shapes_after_crop=((1, 64, 64),) * 6,
        intensities=(STATISTICS,),
        median_relative_size_after_cropping=1.0,
    )
    request = PlanRequest(
        dataset_name="d",
        dataset_json=_dataset(6, 2),
        fingerprint=fingerprint,
        overwrite_target_spacing=(10.0, 1.0, 1.0),
    )
    planned = plan_experiment(request)
    assert list(planned.plans["configurations"]) == ["2d"]
    assert any("less than one voxel" in note for note in planned.notes)


def test_a_fingerprint_of_another_dataset_is_refused() -> None:
    fingerprint = Fingerprint(
        spacings=((1.0, 1.0, 1.0),),
        shapes_after_crop=((64, 64, 64),),
        intensities=(STATISTICS,) * 2,
        median_relative_size_after_cropping=1.0,
    )
    with pytest.raises(DatasetInvalid, match="different datasets"):
        plan_experiment(PlanRequest(dataset_name="d", dataset_json=_dataset(1, 2), fingerprint=fingerprint))


@pytest.mark.parametrize("profile", ["nnunet", "article"])
@pytest.mark.parametrize("planner", list(PLANNERS))
def test_what_is_planned_is_what_the_engine_reads(planner: PlannerName, profile: str) -> None:
    planned = _plan((1.5, 0.8, 0.8), (400, 700, 700), planner=planner, profile=profile)
    plans = read_plans(planned.plans)
    assert set(plans.configurations) == {"2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"}
    assert plans.configurations["3d_cascade_fullres"].previous_stage == "3d_lowres"


def test_writing_again_keeps_configurations_of_the_user_and_drops_stale_ones(tmp_path: Path) -> None:
    path = tmp_path / "nnUNetPlans.json"
    write_plans(_plan((1, 0.7676, 0.7676), (482, 512, 512)).plans, path)
    content = json.loads(path.read_text())
    content["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    path.write_text(json.dumps(content))
    small = _plan((1, 1, 1), (64, 64, 64)).plans
    write_plans(small, path)
    again = json.loads(path.read_text())
    assert list(again["configurations"]) == ["2d", "3d_fullres", "mine"]
    assert again["configurations"]["3d_fullres"] == small["configurations"]["3d_fullres"]


def test_a_file_that_is_no_plans_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "precious.json"
    path.write_text('{"a": 1}')
    with pytest.raises(DatasetInvalid, match="no plans file"):
        write_plans(_plan((1, 1, 1), (64, 64, 64)).plans, path)
    assert path.read_text() == '{"a": 1}'
