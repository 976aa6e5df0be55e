"""A dataset with plans whose networks are small enough to be trained on by `seggate train` in seconds; needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from gateway.cli import app
from tests.support.raw_datasets import write_array, write_dataset

NAME = "Dataset901_Tiny"
FEATURES = (4, 6, 8)


def write_bright(folder: Path, *, cases: int = 6, shape: tuple[int, int, int] = (10, 16, 18), **changes: Any) -> Path:
    """Cases in which each label has its own brightness, of several sizes. `changes`: as for `write_dataset`."""
    write_dataset(folder, cases=cases, **changes)
    random = np.random.default_rng(5)
    for index in range(cases):
        labels = np.zeros(shape, dtype=np.uint8)
        labels[1:8, 3:9, 3 : 8 + index % 3] = 1
        labels[2:7, 9:14, 5 : 9 + index % 4] = 2
        image = random.normal(50, 5, shape) + 60 * (labels == 1) + 120 * (labels == 2)
        write_array(folder / "imagesTr" / f"case_{index:02}_0000.nii.gz", image.astype(np.float32), (1.0, 1.0, 1.0))
        write_array(folder / "labelsTr" / f"case_{index:02}.nii.gz", labels, (1.0, 1.0, 1.0))
    return folder


def seggate(root: Path, *words: str) -> Result:
    """A command on the dataset below `root`, with its folders there."""
    where = ["--preprocessed", str(root / "preprocessed")] if words[0] in ("plan", "select", "export") else []
    if words[0] == "train" and words[1] not in ("status", "stop"):
        where = ["--preprocessed", str(root / "preprocessed"), "--processes", "1"]
        # Some seconds for a new process; what it finds is known for these networks.
        where += [] if "--probe" in words else ["--no-probe"]
    if words[0] in ("plan", "select"):
        where += ["--processes", "1"]
    if words[0] != "plan":
        where += ["--results", str(root / "results")]
    return CliRunner().invoke(app, [*words, *where])


def planned(root: Path, *, folds: int = 2, profile: str = "nnunet", cascade: bool = False, **dataset: Any) -> Path:
    """The raw dataset below `root`, planned: 2d and 3d_fullres, with networks of `FEATURES`; with `cascade` also
    3d_lowres and 3d_cascade_fullres."""
    raw = root / NAME
    write_bright(raw, **dataset)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").iterdir())
    splits = [{"train": [n for n in names if n not in names[i::folds]], "val": names[i::folds]} for i in range(folds)]
    (raw / "splits_final.json").write_text(json.dumps(splits))
    ran = seggate(root, "plan", str(raw), "--plans-only", "--profile", profile)
    assert ran.exit_code == 0, ran.output
    plans = next((root / "preprocessed" / NAME).glob("nnUNet*Plans.json"))
    shrink(plans)
    if cascade:
        add_cascade(plans)
    return raw


def shrink(path: Path) -> None:
    """Gives every network of the plans few stages and features."""
    plans = json.loads(path.read_text())
    for configuration in plans["configurations"].values():
        if "architecture" not in configuration:
            continue
        kwargs = configuration["architecture"]["arch_kwargs"]
        dimensions = len(configuration["patch_size"])
        kwargs |= {
            "n_stages": len(FEATURES),
            "features_per_stage": list(FEATURES),
            "kernel_sizes": [[3] * dimensions] * len(FEATURES),
            "strides": [[1] * dimensions] + [[2] * dimensions] * (len(FEATURES) - 1),
            "n_conv_per_stage": [1] * len(FEATURES),
            "n_conv_per_stage_decoder": [1] * (len(FEATURES) - 1),
        }
        configuration["patch_size"] = [8] * dimensions
        configuration["batch_size"] = 2
    path.write_text(json.dumps(plans))


def add_cascade(path: Path, *, coarser: float = 1.5) -> None:
    """Gives the plans what nnU-Net's planner gives larger images: 3d_lowres, and the cascade that uses it."""
    plans = json.loads(path.read_text())
    full = plans["configurations"].pop("3d_fullres")
    plans["configurations"]["3d_lowres"] = {
        **full,
        "data_identifier": full["data_identifier"].replace("fullres", "lowres"),
        "spacing": [coarser * edge for edge in full["spacing"]],
        "batch_dice": False,
        "next_stage": "3d_cascade_fullres",
    }
    plans["configurations"]["3d_fullres"] = {**full, "batch_dice": True}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(plans))


def shown(result: Result) -> Any:
    """The JSON document that a command printed."""
    return json.loads(result.stdout)
