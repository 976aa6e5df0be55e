"""engine.machine: what a plan is made for; the same parts are the same machine, and nothing names it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from engine import machine
from engine.machine import allowed_cores, this_identity


@pytest.fixture(autouse=True)
def _no_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _name: None)


def test_the_same_machine_has_the_same_key_and_another_one_another() -> None:
    here = this_identity()
    assert here == this_identity()
    assert len(here.key) == 16
    others = (
        replace(here, cores=here.cores + 1),
        replace(here, flags=(*here.flags, "amx_bf16")),
        replace(here, gpu="a GPU, 80 GiB, 550.1"),
        replace(here, processor="another"),
    )
    assert len({here.key, *(other.key for other in others)}) == 5
    assert os.uname().nodename not in str(asdict(here))


@pytest.mark.parametrize(
    ("content", "cores"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("9900000 100000", 4), ("x", 4)],
)
def test_a_container_may_use_less_than_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(4)))
    (tmp_path / "cpu.max").write_text(content)
    assert allowed_cores() == cores


def test_flags_are_those_that_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A B\nflags\t\t: fpu avx512f amx_bf16 avx2\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    here = this_identity()
    assert (here.processor, here.flags) == ("A B", ("amx_bf16", "avx2", "avx512f"))


def test_a_gpu_is_named_with_memory_and_driver_and_a_tool_that_fails_means_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/nvidia-smi")

    def answers(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, stdout="NVIDIA L4, 23034 MiB, 550.54.15\n")

    def fails(command: list[str], **_: Any) -> Any:
        raise subprocess.CalledProcessError(9, command)

    monkeypatch.setattr(subprocess, "run", answers)
    assert this_identity().gpu == "NVIDIA L4, 23034 MiB, 550.54.15"
    monkeypatch.setattr(subprocess, "run", fails)
    assert this_identity().gpu == ""
