"""gateway.training_device: what the command line asks for, against what is there."""
# ruff: noqa: E402

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.errors import TrainingRefused
from gateway.training_device import chosen_device, chosen_precision, set_threads, training_packages

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _second_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", str(size))


@pytest.mark.usefixtures("gpus")
def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_device("auto") == torch.device("cuda", 0)
    assert chosen_device("cpu") == CPU
    _second_of(monkeypatch, 2)
    assert chosen_device("cuda") == torch.device("cuda", 1)
    _second_of(monkeypatch, 3)
    with pytest.raises(TrainingRefused, match="3 processes need a GPU each, and there are 2"):
        chosen_device("auto")


def test_without_a_gpu_the_processor_is_taken_unless_a_gpu_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == CPU
    with pytest.raises(TrainingRefused, match="torch finds no GPU here"):
        chosen_device("cuda")


def test_fp16_is_for_gpus() -> None:
    assert chosen_precision("auto", torch.device("cuda", 1)) == "fp16"
    assert chosen_precision("bf16", torch.device("cuda", 1)) == "bf16"
    assert chosen_precision("float32", CPU) == "float32"
    with pytest.raises(TrainingRefused, match="fp16 needs a GPU; a processor trains in bf16 or float32"):
        chosen_precision("fp16", CPU)


@pytest.mark.usefixtures("same_threads")
def test_processes_on_one_processor_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    _second_of(monkeypatch, 4)
    set_threads(None, CPU)
    assert torch.get_num_threads() == 2
    set_threads(3, CPU)
    assert torch.get_num_threads() == 3
    set_threads(None, torch.device("cuda", 1))
    assert torch.get_num_threads() == 3


def test_a_missing_package_of_the_extra_is_named_with_what_to_do() -> None:
    with pytest.raises(TrainingRefused, match=r"needs the Python package torch: .*EXTRAS=train"), training_packages():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    with pytest.raises(ModuleNotFoundError), training_packages():
        raise ModuleNotFoundError("No module named 'other'", name="other")
