"""engine.training, engine.batches, engine.memory_probe on a GPU; skipped where torch finds none."""
# ruff: noqa: E402

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.augmentation import draw_batch
from engine.compilation import FastestGradients
from engine.errors import MemoryExceeded
from engine.memory_probe import check_step, measure_step
from engine.schedule import Schedule
from engine.training import Trainer
from engine.training_setup import TrainingSetup
from tests.support.tiny_training import same_weights, tiny_setup, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

SCHEDULE = Schedule(epochs=2, iterations=30, validation_iterations=2)


def _free_bytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(0)[0]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_setup(folder, schedule=SCHEDULE, device=torch.device("cuda", 0), loader_threads=2)


def test_a_batch_made_on_a_gpu_is_that_of_the_processor(tmp_path: Path, setup: TrainingSetup) -> None:
    sources = [
        Trainer(replace(setup, device=torch.device(name)), tmp_path / name).source("training")
        for name in ("cpu", "cuda")
    ]
    compared = 0
    for iteration in range(16):
        (images, labels), (gpu_images, gpu_labels) = (source.batch(0, iteration) for source in sources)
        assert gpu_images.is_cuda
        assert gpu_labels.is_cuda
        draws = draw_batch(setup.augmentation, 1, range(len(images)), seed=setup.seed, epoch=0, iteration=iteration)
        for index, draw in enumerate(draws):
            # Where a label map is turned, rounding decides a voxel that lies between two labels.
            assert (gpu_labels[index].cpu() != labels[index]).float().mean() < 0.002
            # A field of noise is another one on another kind of device.
            if draw.noise_sigma is None:
                torch.testing.assert_close(gpu_images[index].cpu(), images[index], rtol=1e-3, atol=1e-3)
                compared += 1
    assert compared > 20


def test_a_gpu_learns_in_each_precision_what_the_processor_learns(tmp_path: Path, setup: TrainingSetup) -> None:
    reached: dict[str, float] = {}
    for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "fp16"), ("cuda", "bf16")):
        name = f"{device}-{precision}"
        changes = {"device": torch.device(device), "precision": precision, "deterministic": False, "compile": "off"}
        chosen = replace(setup, **changes)  # type: ignore[arg-type]
        trainer = Trainer(chosen, tmp_path / name)
        assert trainer.run()
        assert all(parameter.dtype == torch.float32 for parameter in trainer.network.parameters())
        reached[name] = trainer.records[-1].train_loss
        assert reached[name] < trainer.records[0].train_loss - 0.1
    reference = reached.pop("cpu-float32")
    assert all(value == pytest.approx(reference, abs=0.05) for value in reached.values()), (reference, reached)


@pytest.mark.parametrize("precision", ["float32", "fp16", "bf16"])
def test_two_deterministic_trainings_on_a_gpu_give_the_same_weights_bit_for_bit(
    tmp_path: Path, setup: TrainingSetup, precision: str
) -> None:
    chosen = replace(setup, precision=precision)  # type: ignore[arg-type]
    trainers = [Trainer(replace(chosen, loader_threads=threads), tmp_path / str(threads)) for threads in (0, 1, 2)]
    for trainer in trainers:
        assert trainer.run()
    assert same_weights(weights(trainers[0]), weights(trainers[1]))
    assert same_weights(weights(trainers[0]), weights(trainers[2]))


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_training_on_a_gpu_that_was_stopped_and_resumed_is_that_which_was_not(
    tmp_path: Path, setup: TrainingSetup, precision: str
) -> None:
    chosen = replace(setup, precision=precision)  # type: ignore[arg-type]
    whole = Trainer(chosen, tmp_path / "whole")
    assert whole.run()
    asked = iter(range(1000))
    assert not Trainer(chosen, tmp_path / "stopped").run(stop=lambda: next(asked) >= 40)
    resumed = Trainer(chosen, tmp_path / "stopped")
    assert (resumed.epoch, resumed.is_finished) != (0, True)
    assert resumed.run()
    assert same_weights(weights(resumed), weights(whole))


def test_a_compiled_network_learns_the_same(tmp_path: Path, setup: TrainingSetup) -> None:
    notes: list[str] = []
    losses = []
    for mode in ("off", "on"):
        chosen = replace(setup, deterministic=False, precision="fp16", compile=mode)
        trainer = Trainer(chosen, tmp_path / mode, note=notes.append)
        assert trainer.run()
        losses.append(statistics.mean(record.train_loss for record in trainer.records))
    assert notes[0] == "steps are compiled"
    assert "compiled and as a CUDA graph" in notes[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.parametrize("precision", ["float32", "fp16", "bf16"])
def test_a_step_as_a_cuda_graph_is_the_step_that_it_is_without(
    tmp_path: Path, setup: TrainingSetup, precision: str
) -> None:
    chosen = replace(setup, deterministic=False, precision=precision, compile="off")  # type: ignore[arg-type]
    plain, graphed = Trainer(chosen, tmp_path / "plain"), Trainer(chosen, tmp_path / "graphed")
    source = plain.source("training")
    before = [plain.step(source.batch(0, 0)), graphed.step(source.batch(0, 0))]
    ways = {way.name: way for way in graphed._step.ways("auto", alone=True)}
    graphed._gradients = FastestGradients(ways["as a CUDA graph"].prepare(*source.batch(0, 1)))
    assert before[0] == pytest.approx(before[1], abs=1e-6)
    for iteration in range(1, 20):
        batch = source.batch(0, iteration)
        assert graphed.step(batch) == pytest.approx(plain.step(batch), abs=0.01 if precision != "float32" else 2e-3)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(graphed)[name], tensor, rtol=0.02, atol=2e-3)


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
def test_a_step_is_measured_on_the_gpu_and_one_that_does_not_fit_is_refused(
    setup: TrainingSetup,
) -> None:
    def sized(patch_size: tuple[int, ...], batch_size: int) -> TrainingSetup:
        return replace(
            setup,
            deterministic=False,
            configuration=replace(setup.configuration, patch_size=patch_size, batch_size=batch_size),
            augmentation=replace(setup.augmentation, patch_size=patch_size),
        )

    small = measure_step(sized((16, 24, 24), 2), label_entries=3)
    large = measure_step(sized((64, 96, 96), 4), label_entries=3)
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    # The feature maps of the full resolution alone, with what is kept for their gradients.
    assert large.peak_bytes > small.peak_bytes + 4 * 64 * 96 * 96 * 4 * 4 * 4
    assert large.device == torch.cuda.get_device_name(0)
    assert large.available_bytes <= large.total_bytes
    check_step(large)
    taken: list[torch.Tensor] = []
    while (beyond := _free_bytes() - large.peak_bytes // 2) > 0:
        taken.append(torch.empty(max(beyond, 2**21), dtype=torch.uint8, device="cuda:0"))
    refused = measure_step(sized((64, 96, 96), 4), label_entries=3)
    del taken
    assert refused.peak_bytes is None
    with pytest.raises(MemoryExceeded, match="takes more than there is"):
        check_step(refused)
    assert measure_step(sized((16, 24, 24), 2), label_entries=3).fits  # nothing is left of what failed
