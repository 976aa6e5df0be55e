"""A site whose studies are small and easy to learn, and the network that was trained on them; needs torch.

The asymmetric phantom (tests/support/phantoms.py) as MR, with noise of its own per patient. A second scanner shows the
same patients with another contrast.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pydicom
from numpy.typing import NDArray
from typer.testing import CliRunner

from engine.bundle import Bundle, write_bundle
from engine.nifti import write_image, write_nifti
from engine.volume import Geometry, LabelMap
from gateway.cli import app
from tests.support.phantoms import PhantomPatient, PhantomSeries, asymmetric_content, asymmetric_labels, phantom_affine
from tests.support.phantoms import write_series as write_phantom
from tests.support.tiny_experiment import shrink

MODEL = "phantom-mr"
DATASET = "Dataset902_Phantom"
SHAPE = (12, 16, 16)
SPACING_MM = (2.0, 2.0, 2.0)
CONFIGURATION = "3d_fullres"
TRAINER = f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
CARD = """
name = "phantom-mr"
semver = "1.0.0"
description = "Two structures of a phantom."
licence = "none"
origin = "tests"
[contract]
orientation = "LPS"
modalities = ["MR"]
"""
ROUTES = f"""
time_zone = "UTC"
[[rules]]
name = "phantoms"
model = "{MODEL}"
[rules.when]
all = [{{ attribute = "Modality", op = "equals", value = "MR" }}]
"""
Scanner = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def first_scanner(image: NDArray[np.float64]) -> NDArray[np.float64]:
    return image


def second_scanner(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """A gamma of 0.5 on what was 0 to 1300, which lifts the background towards the structures."""
    return 1300 * np.clip(image / 1300, 0, 1) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Trained:
    """`raw` is the dataset, `model` the trained model folder, `bundle` its export."""

    raw: Path
    model: Path
    bundle: Path


def write_dataset(folder: Path, seeds: Sequence[int], scanner: Scanner = first_scanner) -> Path:
    """The patients of `seeds` as a raw dataset in nnU-Net's layout."""
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    affine = phantom_affine("axial", spacing_mm=SPACING_MM, shape=SHAPE)
    geometry = Geometry(affine_lps=affine, shape=SHAPE)
    for seed in seeds:
        name = f"patient_{seed:04}"
        image = np.rint(scanner(asymmetric_content(affine, SHAPE, seed=seed))).astype(np.float32)
        write_image(image, geometry, folder / "imagesTr" / f"{name}_0000.nii.gz")
        labels = LabelMap(array=asymmetric_labels(affine, SHAPE), geometry=geometry)
        write_nifti(labels, folder / "labelsTr" / f"{name}.nii.gz")
    document = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "left structure": 1, "right structure": 2},
        "numTraining": len(seeds),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def write_study(folder: Path, seed: int, patient_id: str, scanner: Scanner = first_scanner) -> PhantomSeries:
    """One patient's MR as DICOM files."""
    made = write_phantom(
        folder,
        spacing_mm=SPACING_MM,
        shape=SHAPE,
        modality="MR",
        rescale="none",
        seed=seed,
        patient=PhantomPatient(patient_id=patient_id),
    )
    for file in made.files:
        dataset = pydicom.dcmread(file)
        changed = np.rint(scanner(dataset.pixel_array.astype(np.float64)))
        dataset.PixelData = changed.astype(dataset.pixel_array.dtype).tobytes()
        dataset.save_as(file)
    return made


def train(root: Path, seeds: Sequence[int], *, folds: int = 2, epochs: int = 10, iterations: int = 100) -> Trained:
    """A model of `folds` folds, planned, trained, chosen and exported below `root`."""
    raw = write_dataset(root / DATASET, seeds)
    names = [f"patient_{seed:04}" for seed in seeds]
    splits = [{"train": [n for n in names if n not in names[i::folds]], "val": names[i::folds]} for i in range(folds)]
    (raw / "splits_final.json").write_text(json.dumps(splits))
    preprocessed, results = root / "preprocessed", root / "results"
    places = ["--preprocessed", str(preprocessed), "--results", str(results)]
    run("plan", str(raw), "--preprocessed", str(preprocessed), "--processes", "1", "--plans-only")
    shrink(preprocessed / DATASET / "nnUNetPlans.json")
    run(
        *("train", "run", str(raw), *places, "--configuration", CONFIGURATION, "--epochs", str(epochs)),
        *("--iterations", str(iterations), "--processes", "1", "--threads", "1", "--no-probe"),
        *("--mirror", "none", "--device", "cpu"),
    )
    run("select", str(raw), *places, "--configuration", CONFIGURATION, "--processes", "1")
    card, bundle = root / "card.toml", root / "bundle"
    card.write_text(CARD)
    run("export", str(raw), *places, "--out", str(bundle), "--card", str(card), "--processes", "1")
    return Trained(raw=raw, model=results / DATASET / TRAINER, bundle=bundle)


def run(*words: str) -> str:
    """A command in this process; its output. It must succeed."""
    ran = CliRunner().invoke(app, list(words))
    assert ran.exit_code == 0, ran.output
    return ran.output


def write_exchanged(good: Bundle, folder: Path, *, semver: str) -> Path:
    """The same networks with the outputs of both structures exchanged, as a training with mirrored sides makes them."""
    shutil.copytree(good.root, folder)
    for path in folder.rglob("*.onnx"):
        network = onnx.load(path)
        last = [node for node in network.graph.node if node.op_type == "Conv"][-1]
        for tensor in network.graph.initializer:
            if tensor.name in last.input[1:]:
                array = onnx.numpy_helper.to_array(tensor).copy()
                array[[1, 2]] = array[[2, 1]]
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(network, path)
    documents = {f"{name}_json": json.loads((folder / f"{name}.json").read_text()) for name in ("plans", "dataset")}
    (folder / "bundle.json").unlink()
    named = replace(
        good,
        semver=semver,
        configurations=tuple(
            replace(c, folds=tuple(replace(f, file=folder / f.file.relative_to(good.root)) for f in c.folds))
            for c in good.configurations
        ),
    )
    write_bundle(folder, named, **documents)
    return folder
