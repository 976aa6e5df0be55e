"""What benchmarks/predict.py predicts: volumes and models, made where they are needed and kept in its folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from benchmarks.export_own import label_names
from benchmarks.nnunet_plans import DEFAULT_FEATURES, DEFAULT_STRIDES, ct_plans
from benchmarks.process_tree import ROOT
from benchmarks.turns import Tell, clean_environment
from engine.model_card import ModelCard

SEED = 20240117
CONFIGURATION = "3d_fullres"
HIPPOCAMPUS, CT_SMALL = "Dataset004_Hippocampus", "Dataset900_CTsmall"
_ENDING = ".nii.gz"
Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Volumes:
    """`torso`: the CT of the shared data on a grid of `size` and `spacing_mm` (x, y, z), stretched where its own extent
    is another. `hippocampus`: the first `count` cases of the shared data."""

    kind: str
    count: int = 1
    size: Triple = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """A network with weights drawn from SEED. `spacing_mm` and `patch_size` are (z, y, x)."""

    classes: int
    spacing_mm: tuple[float, float, float]
    patch_size: Triple
    features: tuple[int, ...] = DEFAULT_FEATURES
    strides: tuple[Triple, ...] = DEFAULT_STRIDES


@dataclass(frozen=True, kw_only=True)
class PredictCase:
    """`trained` names a dataset of shared/models, whose network is taken where no `random` one is given. `is_paired`:
    nnU-Net runs too. `pairs`: at least as many of them count. `is_half`: ours runs in bf16."""

    name: str
    network: str
    volumes: Volumes
    mirroring: bool
    trained: str = ""
    random: RandomModel | None = None
    is_paired: bool = True
    pairs: int = 5
    is_half: bool = False


_TORSO_1_MM = Volumes(kind="torso", size=(336, 303, 366), spacing_mm=(1.0, 1.0, 1.0))
_HALVED: Triple = (2, 2, 2)
_ISOTROPIC_STRIDES: tuple[Triple, ...] = ((1, 1, 1), _HALVED, _HALVED, _HALVED, _HALVED, _HALVED)
_DEFAULT_MODEL = RandomModel(classes=6, spacing_mm=(3.0, 3.0, 3.0), patch_size=(96, 112, 128))
_DEFAULT_NAME = "PlainConvUNet 32 to 320 features, 6 stages, seeded random weights"
CASES = (
    PredictCase(
        name="hippocampus-40",
        network="nnUNetSmallPlans 3d_fullres fold 0, 8 to 64 features",
        volumes=Volumes(kind="hippocampus", count=40),
        mirroring=True,
        trained=HIPPOCAMPUS,
    ),
    PredictCase(
        name="ct-small-net",
        network="CTsmall 3d_fullres fold 0, 16 to 128 features",
        volumes=_TORSO_1_MM,
        mirroring=False,
        trained=CT_SMALL,
    ),
    PredictCase(
        name="ct-default-net",
        network=_DEFAULT_NAME,
        volumes=_TORSO_1_MM,
        mirroring=True,
        random=_DEFAULT_MODEL,
        pairs=2,
    ),
    PredictCase(
        name="ct-default-net-bf16",
        network=_DEFAULT_NAME,
        volumes=_TORSO_1_MM,
        mirroring=True,
        random=_DEFAULT_MODEL,
        pairs=2,
        is_half=True,
    ),
    PredictCase(
        name="ct-512",
        network="PlainConvUNet 32 to 320 features, 6 stages, patch 128x128x128, seeded random weights",
        volumes=Volumes(kind="torso", size=(512, 512, 300), spacing_mm=(0.8, 0.8, 1.5)),
        mirroring=True,
        random=RandomModel(
            classes=6, spacing_mm=(1.5, 1.0, 1.0), patch_size=(128, 128, 128), strides=_ISOTROPIC_STRIDES
        ),
        pairs=2,
    ),
    PredictCase(
        name="whole-104",
        network="PlainConvUNet 16/32/64/128 features, 4 stages, patch 128x128x128, 104 heads, seeded random weights",
        volumes=Volumes(kind="torso", size=(512, 512, 600), spacing_mm=(0.8, 0.8, 1.0)),
        mirroring=False,
        random=RandomModel(
            classes=104,
            spacing_mm=(1.5, 1.5, 1.5),
            patch_size=(128, 128, 128),
            features=(16, 32, 64, 128),
            strides=_ISOTROPIC_STRIDES[:4],
        ),
        is_paired=False,
        pairs=0,
    ),
)
# What runs without --cases: on a processor, and for a GPU.
ON_CPU = ("hippocampus-40", "ct-small-net", "ct-default-net", "ct-default-net-bf16", "whole-104")
ON_CUDA = ("ct-512",)

GROWTH = tuple(
    PredictCase(
        name=f"{voxels}x voxels, {classes} classes",
        network="PlainConvUNet 16/32/64/128 features, 4 stages, patch 64x64x64, seeded random weights",
        volumes=Volumes(kind="torso", size=size, spacing_mm=(1.5, 1.5, 1.5)),
        mirroring=False,
        random=RandomModel(
            classes=classes,
            spacing_mm=(2.25, 2.25, 2.25),
            patch_size=(64, 64, 64),
            features=(16, 32, 64, 128),
            strides=_ISOTROPIC_STRIDES[:4],
        ),
        is_paired=False,
        pairs=0,
    )
    for classes in (2, 8, 25, 104)
    for voxels, size in ((1, (224, 202, 244)), (2, (224, 202, 488)), (4, (224, 404, 488)))
)


class Materials:
    """Volumes and models in `work`, each made once. `nnunet_python` makes the networks."""

    def __init__(self, work: Path, shared: Path, nnunet_python: Path, tell: Tell) -> None:
        self._work = work
        self._shared = shared
        self._nnunet_python = nnunet_python
        self._tell = tell

    def images(self, volumes: Volumes) -> Path:
        """A folder in nnU-Net's layout (CASE_0000.nii.gz)."""
        if volumes.kind == "hippocampus":
            folder = self._work / "volumes" / f"hippocampus-{volumes.count}"
            source = self._shared / "data" / HIPPOCAMPUS / "imagesTr"
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.glob(f"*{_ENDING}"))[: volumes.count]:
                if not (folder / file.name).exists():
                    shutil.copy(file, folder)
            return folder
        size = "x".join(map(str, volumes.size))
        folder = self._work / "volumes" / f"torso-{size}-{volumes.spacing_mm[2]:g}mm"
        file = folder / f"torso_0000{_ENDING}"
        if not file.exists():
            self._tell(f"making a volume of {size}")
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder.with_name(f"partial-{size}{_ENDING}")
            write_torso(self._shared / "data", partial, volumes)
            partial.rename(file)
        return folder

    def results(self, case: PredictCase) -> tuple[Path, str, str]:
        """nnU-Net's results: the folder for nnUNet_results, the dataset and the plans' name."""
        if case.random is None:
            (found,) = (self._shared / "models" / case.trained).glob(f"nnUNetTrainer__*__{CONFIGURATION}")
            return self._shared / "models", case.trained, found.name.split("__")[1]
        model = case.random
        form = hashlib.sha256(repr((model, case.mirroring, SEED)).encode()).hexdigest()[:12]
        name = f"Dataset901_Random{form}"
        folder = self._work / "models" / name / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
        if not (folder / "fold_0" / "checkpoint_final.pth").exists():
            self._tell(f"{case.name}: making a network of {model.classes} heads")
            folder.mkdir(parents=True, exist_ok=True)
            plans = ct_plans(
                spacing_mm=model.spacing_mm,
                patch_size=model.patch_size,
                dataset_name=name,
                features=model.features,
                strides=model.strides,
            )
            dataset = {
                "channel_names": {"0": "CT"},
                "labels": label_names(model.classes),
                "numTraining": 1,
                "file_ending": _ENDING,
            }
            (folder / "plans.json").write_text(json.dumps(plans))
            (folder / "dataset.json").write_text(json.dumps(dataset))
            command = [str(self._nnunet_python), str(ROOT / "benchmarks" / "nnunet_model.py"), str(folder), str(SEED)]
            axes = [0, 1, 2] if case.mirroring else []
            done = subprocess.run(
                [*command, json.dumps(axes)], env=nnunet_environment(), capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"nnU-Net could not make the network:\n{(done.stdout + done.stderr)[-2000:]}")
        return self._work / "models", name, "nnUNetPlans"

    def bundle(self, case: PredictCase) -> Path:
        """The same model as a bundle."""
        from engine.export import import_model  # torch, which nothing else here needs

        results, dataset, plans = self.results(case)
        bundle = self._work / "bundles" / dataset
        if not bundle.exists():
            self._tell(f"{case.name}: importing the model")
            source = results / dataset / f"nnUNetTrainer__{plans}__{CONFIGURATION}"
            # nnU-Net takes voxels in the order in which a file has them.
            card = ModelCard(contract={"orientation": "as-stored"})
            name = dataset.lower().replace("_", "-")
            import_model(source, bundle, name=name, card=card, folds=["0"], phantoms=False)
        return bundle


def write_torso(shared_data: Path, file: Path, volumes: Volumes) -> None:
    """The torso CT as int16 on the grid asked for, linearly resampled."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(shared_data / "dicom" / "ct-torso" / "series")))
    image = sitk.Cast(reader.Execute(), sitk.sitkFloat32)
    own, wanted = image.GetSize(), zip(volumes.size, volumes.spacing_mm, strict=True)
    image.SetSpacing([size * spacing / edge for (size, spacing), edge in zip(wanted, own, strict=True)])
    grid = sitk.Image(volumes.size, sitk.sitkUInt8)
    grid.SetSpacing(volumes.spacing_mm)
    grid.SetDirection(image.GetDirection())
    # Both grids cover the same box, whose corner is half a voxel before the first.
    grid.SetOrigin([0.0, 0.0, 0.0])
    half = [(old - new) / 2 for old, new in zip(image.GetSpacing(), volumes.spacing_mm, strict=True)]
    direction = image.GetDirection()
    shift = [math.fsum(direction[3 * row + axis] * half[axis] for axis in range(3)) for row in range(3)]
    image.SetOrigin(shift)
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(grid)
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetDefaultPixelValue(-1024.0)
    # At the edge a sample lies up to half a voxel outside the old centres; the nearest value is taken, not the default.
    resampler.UseNearestNeighborExtrapolatorOn()
    sitk.WriteImage(sitk.Cast(resampler.Execute(image), sitk.sitkInt16), str(file), useCompression=True)


def nnunet_environment(**folders: str) -> dict[str, str]:
    """The environment for nnU-Net's Python; `folders` are nnUNet_results and the like."""
    unused = {f"nnUNet_{kind}": os.devnull for kind in ("raw", "preprocessed", "results")}
    found = clean_environment(**{**unused, **folders})
    del found["PYTHONPATH"]
    return found
