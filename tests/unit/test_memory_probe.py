"""engine.memory_probe: what a step takes is measured, and what does not fit is refused with numbers."""
# ruff: noqa: E402

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.errors import MemoryExceeded
from engine.memory_probe import StepMemory, check_step, measure_step, nnunet_estimate_bytes, run_steps
from engine.plans import read_plans
from engine.training_setup import TrainingSetup
from tests.support.nnunet_results import plans_json
from tests.support.tiny_training import TINY, tiny_setup

MIB = 2**20
MEMORY = StepMemory(
    device="a GPU",
    precision="float32",
    patch_size=(128, 128, 128),
    batch_size=2,
    peak_bytes=7000 * MIB,
    available_bytes=8000 * MIB,
    total_bytes=10000 * MIB,
    estimate_bytes=6000 * MIB,
)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    return tiny_setup(tmp_path_factory.mktemp("tiny"), deterministic=False)


def with_size(setup: TrainingSetup, patch_size: tuple[int, ...], batch_size: int) -> TrainingSetup:
    return replace(
        setup,
        configuration=replace(setup.configuration, patch_size=patch_size, batch_size=batch_size),
        augmentation=replace(setup.augmentation, patch_size=patch_size),
    )


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
def test_a_larger_batch_takes_more_memory_and_too_little_memory_is_noticed(
    setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = measure_step(with_size(setup, (16, 24, 24), 2), label_entries=3)
    large = measure_step(with_size(setup, (32, 96, 96), 4), label_entries=3)
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    # The feature maps of the full resolution alone: input, output of two convolutions each way, and their gradients.
    assert large.peak_bytes > small.peak_bytes + 4 * 32 * 96 * 96 * 4 * 4 * 4
    assert large.fits
    check_step(large)
    monkeypatch.setattr("engine.memory_probe.available_bytes", lambda: 40 * MIB)
    refused = measure_step(with_size(setup, (32, 96, 96), 4), label_entries=3)
    assert refused.peak_bytes is None
    assert not refused.fits
    with pytest.raises(
        MemoryExceeded, match=r"a step of 4 x 32 x 96 x 96 in float32 takes more than there is; 40 of 40"
    ):
        check_step(refused)


@pytest.mark.parametrize("previous", [False, True])
def test_the_steps_are_those_of_a_training_and_leave_nothing(
    tmp_path: Path, setup: TrainingSetup, previous: bool
) -> None:
    if previous:
        plan = replace(setup.augmentation, previous_labels=(1, 2))
        setup = replace(setup, augmentation=plan, channels=3)
    run_steps(setup, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_with_numbers_and_what_to_do() -> None:
    check_step(MEMORY)
    with pytest.raises(MemoryExceeded) as refused:
        check_step(replace(MEMORY, peak_bytes=16000 * MIB))
    assert str(refused.value) == (
        "a step of 2 x 128 x 128 x 128 in float32 takes 16,000 MiB; 8,000 of 10,000 MiB are free on a GPU; nnU-Net's "
        "estimate is 6,000 MiB: plan for less with `seggate plan --gpu-memory-gb 2.8`; or train in half precision "
        "(--precision); or share the batch between several devices (--devices); --no-probe trains all the same"
    )
    half = replace(MEMORY, peak_bytes=None, precision="fp16", batch_size=1)
    with pytest.raises(MemoryExceeded, match=r"takes more than there is;.*--gpu-memory-gb [\d.]+`; --no-probe"):
        check_step(half)


@pytest.mark.parametrize(("peak_mib", "share", "fills"), [(7000, 0.9, True), (7001, 0.9, False), (8000, 1.0, True)])
def test_what_others_have_of_a_device_counts_as_filled(peak_mib: int, share: float, fills: bool) -> None:
    assert replace(MEMORY, peak_bytes=peak_mib * MIB).fills_at_most(share) is fills
    assert not replace(MEMORY, peak_bytes=None).fills_at_most(share)


def test_a_probe_is_kept_as_plain_values() -> None:
    assert StepMemory.from_plain(MEMORY.as_plain()) == MEMORY


def test_the_estimate_is_nnunets_on_its_own_scale() -> None:
    """Of its published plan for 128³ and three labels: 452,796,416 values of 560,000,000 that fill 8 GB."""
    model = replace(
        TINY,
        features=(32, 64, 128, 256, 320, 320),
        strides=((2, 2, 2),) * 5,
        kernels=((3, 3, 3),) * 6,
        patch_size=(128, 128, 128),
    )
    document = plans_json(model)
    kwargs = document["configurations"][model.name]["architecture"]["arch_kwargs"]
    kwargs |= {"n_conv_per_stage": [2] * 6, "n_conv_per_stage_decoder": [2] * 5}
    configuration = read_plans(document).configurations[model.name]
    assert configuration.batch_size == 2
    values = 452_796_416
    assert nnunet_estimate_bytes(configuration, label_entries=3) == int(values / 560e6 * 8e9)
    more = replace(configuration, batch_size=4)
    assert nnunet_estimate_bytes(more, label_entries=3) == pytest.approx(values / 560e6 * 16e9)


def test_a_processor_of_several_processes_has_a_part_of_the_memory_for_each(
    setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.memory_probe.available_bytes", lambda: 1000 * MIB)
    monkeypatch.setattr("engine.memory_probe._peak_in_child", lambda _setup, most: most)
    memory = measure_step(setup, label_entries=3, alike=4)
    assert (memory.available_bytes, memory.peak_bytes) == (250 * MIB, 250 * MIB)
    assert memory.device.startswith("the processor")
    assert setup.device == torch.device("cpu")
