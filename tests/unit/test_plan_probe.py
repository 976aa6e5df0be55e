"""engine.plan_probe: plans that fill the device in the profile article, figures beside nnU-Net's plans in the other."""
# ruff: noqa: E402

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.dataset import DatasetJson
from engine.errors import MemoryExceeded
from engine.fingerprint import Fingerprint, IntensityStatistics
from engine.labels import LabelManager
from engine.memory_probe import StepMemory
from engine.plan_probe import PlanProbe
from engine.planners import ProfileName
from engine.planning import PlanRequest, plan_experiment
from engine.plans import read_plans
from engine.training_setup import TrainingSetup

TOTAL = 24 * 10**9
CASES = 131
BYTES_A_VOXEL = 600  # of the patch, by a network that is made up


class MadeUpGpu:
    """Measures by a formula, and counts."""

    total, measured = TOTAL, 0

    def measure(self, setup: TrainingSetup, *, label_entries: int, planner: str | None) -> StepMemory:
        assert label_entries == 3
        assert planner == "ExperimentPlanner"
        self.measured += 1
        configuration = setup.configuration
        peak = 10**9 + BYTES_A_VOXEL * configuration.batch_size * math.prod(configuration.patch_size)
        return StepMemory(
            device="made up",
            precision=setup.precision,
            patch_size=configuration.patch_size,
            batch_size=configuration.batch_size,
            peak_bytes=peak if peak < self.total else None,
            available_bytes=self.total,
            total_bytes=self.total,
            estimate_bytes=1,
        )


LABELS = {"labels": {"background": 0, "first": 1, "second": 2}}
DATASET = DatasetJson(
    document=LABELS,
    channel_names=("CT",),
    labels=LabelManager.from_dataset_json(LABELS),
    num_training=CASES,
    file_ending=".nii.gz",
    image_reader_writer="SimpleITKIO",
    patients={},
)
FINGERPRINT = Fingerprint(
    spacings=((1.0, 0.8, 0.8),) * 3,
    shapes_after_crop=((400, 512, 512),) * 3,
    intensities=(
        IntensityStatistics(
            max=100.0, mean=50.0, median=50.0, min=0.0, percentile_00_5=1.0, percentile_99_5=99.0, std=20.0
        ),
    ),
    median_relative_size_after_cropping=1.0,
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    made_up = MadeUpGpu()
    monkeypatch.setattr("engine.plan_probe.measure_step", made_up.measure)
    return made_up


def plan(profile: ProfileName, *, fits: bool) -> tuple[dict[str, Any], dict[str, StepMemory]]:
    probe = PlanProbe(DATASET, "ExperimentPlanner", device=torch.device("cpu"), precision="fp16")
    request = PlanRequest(
        dataset_name="Dataset001_Probe",
        dataset_json=DATASET,
        fingerprint=FINGERPRINT,
        profile=profile,
        fit=probe.fit if fits else None,
    )
    plans = plan_experiment(request).plans
    return plans, probe.add_to(plans)


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
@pytest.mark.parametrize("total", [TOTAL, TOTAL // 4, 20 * TOTAL])
def test_the_article_fills_nine_tenths_of_the_device(gpu: MadeUpGpu, total: int) -> None:
    gpu.total = total
    plans, found = plan("article", fits=True)
    assert set(found) == {"2d", "3d_fullres", "3d_lowres"}
    for name, memory in found.items():
        made = plans["configurations"][name]
        assert (tuple(made["patch_size"]), made["batch_size"]) == (memory.patch_size, memory.batch_size)
        assert memory.peak_bytes is not None
        assert memory.peak_bytes <= 0.9 * total
        one_more = BYTES_A_VOXEL * math.prod(memory.patch_size)
        # A batch has no more than a twentieth of the dataset, as in nnU-Net.
        voxels = 400 * 512 * 512 if name == "2d" else math.prod(made["median_image_size_in_voxels"])
        most = round(0.05 * CASES * voxels / math.prod(memory.patch_size))
        assert memory.peak_bytes + one_more > 0.9 * total or memory.batch_size == most
    assert gpu.measured < 80
    assert read_plans(plans).configurations["3d_cascade_fullres"].batch_size == found["3d_fullres"].batch_size
    assert plans["seggate"]["memory"]["2d"]["peak_bytes"] == found["2d"].peak_bytes


def test_nnunets_plans_are_measured_and_not_changed(gpu: MadeUpGpu) -> None:
    plans, found = plan("nnunet", fits=False)
    expected = plan_experiment(
        PlanRequest(dataset_name="Dataset001_Probe", dataset_json=DATASET, fingerprint=FINGERPRINT)
    ).plans
    assert {key: value for key, value in plans.items() if key != "seggate"} == expected
    assert gpu.measured == len(found) == 3


def test_a_device_that_is_too_small_is_an_error(gpu: MadeUpGpu) -> None:
    gpu.total = 10**9
    with pytest.raises(MemoryExceeded, match="not even 2 patches"):
        plan("article", fits=True)
