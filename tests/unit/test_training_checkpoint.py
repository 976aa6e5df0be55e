"""engine.training_checkpoint: nnU-Net's layout, whole files only, and nothing that has to be trusted to be read."""
# ruff: noqa: E402

from __future__ import annotations

import io
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.checkpoint import read_checkpoint
from engine.errors import ImportRefused, TrainingRefused
from engine.network import build_network
from engine.plans import read_plans
from engine.training_checkpoint import TrainingState, init_args, read_state, with_copies, write_state
from tests.support.nnunet_results import TrainedModel, dataset_json, plans_json, state_dict_with_copies
from tests.support.tiny_training import TINY

MODELS = [TINY, replace(TINY, network="ResidualEncoderUNet")]


def network_of(model: TrainedModel) -> torch.nn.Module:
    architecture = read_plans(plans_json(model)).configurations[model.name].architecture
    return build_network(architecture, channels=1, heads=model.heads)


def state_of(model: TrainedModel) -> TrainingState:
    network = network_of(model).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99)
    for parameter in network.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return TrainingState(
        weights=network.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=None,
        epoch=3,
        best_ema=0.5,
        logging={"train_losses": [0.5, math.nan]},
        init_args=init_args(plans_json(model), model.name, 0, dataset_json(model)),
        mirror_axes=(0, 2),
        own={"iteration": 2},
    )


@pytest.mark.parametrize("model", MODELS, ids=["plain", "residual"])
def test_a_state_is_read_back_as_it_was_written(tmp_path: Path, model: TrainedModel) -> None:
    state = state_of(model)
    write_state(state, tmp_path / "checkpoint.pth")
    read = read_state(tmp_path / "checkpoint.pth")
    assert read.weights.keys() == state.weights.keys()
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in state.weights.items())
    assert read.optimizer["param_groups"] == state.optimizer["param_groups"]
    for index, moments in state.optimizer["state"].items():
        stored = read.optimizer["state"][index]["momentum_buffer"]
        assert torch.equal(stored, moments["momentum_buffer"])
        assert stored.is_contiguous()
    assert (read.epoch, read.best_ema, read.mirror_axes, read.own["iteration"]) == (3, 0.5, (0, 2), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("model", MODELS, ids=["plain", "residual"])
def test_the_layout_is_nnunets_with_every_copy(tmp_path: Path, model: TrainedModel) -> None:
    write_state(state_of(model), tmp_path / "checkpoint.pth")
    document: dict[str, Any] = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert set(document) - {"seggate"} == {
        "network_weights",
        "optimizer_state",
        "grad_scaler_state",
        "logging",
        "_best_ema",
        "current_epoch",
        "init_args",
        "trainer_name",
        "inference_allowed_mirroring_axes",
    }
    assert set(document["network_weights"]) == set(state_dict_with_copies(network_of(model)))
    assert document["init_args"]["configuration"] == model.name
    assert document["init_args"]["device"] == torch.device("cpu")
    assert document["trainer_name"] == "nnUNetTrainer"
    assert read_checkpoint(tmp_path / "checkpoint.pth").mirror_axes == (0, 2)


def test_copies_share_their_memory_so_that_the_file_holds_each_tensor_once(tmp_path: Path) -> None:
    state = state_of(TINY)
    named = with_copies(state.weights)
    assert len(named) > 2 * len(state.weights)
    assert len({tensor.data_ptr() for tensor in named.values()}) == len(state.weights)
    write_state(state, tmp_path / "checkpoint.pth")
    parameters = sum(tensor.numel() for tensor in state.weights.values())
    # Weights and momenta, and what zip and names cost.
    assert (tmp_path / "checkpoint.pth").stat().st_size < 2 * 4 * parameters + 700 * len(named) + 20_000


def test_no_mirroring_is_none_for_nnunet(tmp_path: Path) -> None:
    write_state(replace(state_of(TINY), mirror_axes=()), tmp_path / "checkpoint.pth")
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=False)["inference_allowed_mirroring_axes"] is None
    assert read_state(tmp_path / "checkpoint.pth").mirror_axes == ()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("broken")])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "checkpoint.pth"
    write_state(state_of(TINY), path)
    kept = path.read_bytes()

    def fail(_document: object, file: io.BufferedWriter) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        write_state(state_of(TINY), path)
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_nnunet_itself_is_no_state_to_resume(tmp_path: Path) -> None:
    write_state(state_of(TINY), tmp_path / "checkpoint.pth")
    document = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    del document["seggate"]
    torch.save(document, tmp_path / "checkpoint.pth")
    with pytest.raises(TrainingRefused, match=r"checkpoint\.pth: was not written by this version of the engine"):
        read_state(tmp_path / "checkpoint.pth")


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("it was run",))

    torch.save({"network_weights": {}, "seggate": Trap()}, tmp_path / "checkpoint.pth", pickle_module=pickle)
    with pytest.raises(ImportRefused, match="nothing of it was run"):
        read_state(tmp_path / "checkpoint.pth")
