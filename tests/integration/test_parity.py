"""The engine against nnU-Net v2 itself: label maps that nnU-Net predicted with the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend_probe import probe
from engine.backends import RUNTIMES, BackendChoice
from engine.bundle import Bundle
from engine.errors import MemoryExceeded
from engine.export import import_model
from engine.model_card import ModelCard
from engine.nifti import read_label_map, read_nifti
from engine.predictor import Prediction, Predictor
from engine.sanity_check import STRICT, Limits
from tests.support.peers import require_peer, shared_root

pytestmark = [pytest.mark.peer("torch", "shared-data")]

TORCH, *EXACT = (
    BackendChoice(runtime=name, provider="cpu", precision="float32", threads=2)
    for name in sorted(RUNTIMES, key=lambda name: name != "torch")
)
"""All that the tuner may choose on a processor without a tolerance; torch, where it is asked for by name."""
BF16 = BackendChoice(runtime="openvino", provider="cpu", precision="bf16", threads=2)
BF16_TOLERANCE = 1e-2
"""These networks are weak, so that many voxels lie near a border of labels."""

# nnU-Net sees voxels as the file stores them.
AS_STORED = ModelCard(contract={"orientation": "as-stored"})

HIPPOCAMPUS: Mapping[str, Mapping[str, Any]] = {
    "3d_fold0_mirror": {"configurations": ["3d_fullres"], "folds": ["0"]},
    "3d_fold0_plain": {"configurations": ["3d_fullres"], "folds": ["0"], "mirroring": False},
    "3d_folds01_mirror": {"configurations": ["3d_fullres"]},
    "2d_fold0_mirror": {"configurations": ["2d"]},
    "2d_3d_ensemble": {"configurations": ["2d", "3d_fullres"]},
}
IMAGES = (
    "hippocampus_023",
    "hippocampus_107",
    "hippocampus_212",
    "hippocampus_286",
    "hippocampus_311",
    "hippocampus_359",
    "hippocrop_study1",
    "hippocrop_study3",
)
CT_IMAGES = ("ct_organs", "ct_torso", "ct_torso_thick")


def imported(folder: str, out_dir: Path) -> Bundle:
    require_peer("torch")
    return import_model(shared_root() / "models" / folder, out_dir, card=AS_STORED, phantoms=False, name="reference")


@pytest.fixture(scope="module")
def hippocampus_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return imported("Dataset004_Hippocampus", tmp_path_factory.mktemp("hippocampus") / "bundle")


@pytest.fixture(scope="module")
def ct_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return imported("Dataset900_CTsmall", tmp_path_factory.mktemp("ct") / "bundle")


@pytest.fixture(scope="module", params=EXACT, ids=str)
def hippocampus(hippocampus_bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Predictor]:
    with Predictor(hippocampus_bundle, choice=request.param) as predictor:
        yield predictor


@pytest.fixture(scope="module", params=EXACT, ids=str)
def ct(ct_bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Predictor]:
    with Predictor(ct_bundle, choice=request.param) as predictor:
        yield predictor


def check(result: Prediction, reference_file: Path, *, limits: Limits = STRICT) -> None:
    """Identical grid, 99.99 % of the voxels, and a Dice of 0.999 for every label, or what the limits say."""
    reference = read_label_map(reference_file)
    found, wanted = result.labels.array, reference.array
    assert result.labels.geometry.same_grid(reference.geometry, tolerance_mm=1e-6)
    differing = int((found != wanted).sum())
    assert differing / wanted.size <= limits.changed_share, f"{differing} of {wanted.size} voxels differ"
    for label in np.unique(wanted[wanted > 0]):
        mine, theirs = found == label, wanted == label
        dice = 2 * int((mine & theirs).sum()) / int(mine.sum() + theirs.sum())
        assert dice >= 1 - limits.dice_change, f"label {label}: Dice {dice:.5f}"


@pytest.mark.requirement("INF-36", open="GPU against CPU, and memory over 1000 volumes")
@pytest.mark.requirement("ART-14")
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("case", HIPPOCAMPUS)
def test_hippocampus_labels_are_those_of_nnunet(
    hippocampus: Predictor, shared_root: Path, case: str, image: str
) -> None:
    reference = shared_root / "reference"
    volume = read_nifti([reference / "inputs" / f"{image}_0000.nii.gz"])
    check(hippocampus.predict(volume, **HIPPOCAMPUS[case]), reference / "predictions" / case / f"{image}.nii.gz")


@pytest.mark.requirement("INF-36", open="GPU against CPU, and memory over 1000 volumes")
@pytest.mark.requirement("ART-14")
@pytest.mark.parametrize("image", CT_IMAGES)
def test_ct_labels_are_those_of_nnunet_on_finer_equal_and_thicker_slices(
    ct: Predictor, shared_root: Path, image: str
) -> None:
    reference = shared_root / "reference"
    volume = read_nifti([reference / "inputs_ct" / f"{image}_0000.nii.gz"])
    check(ct.predict(volume, mirroring=False), reference / "predictions" / "ct_plain" / f"{image}.nii.gz")


@pytest.mark.parametrize("case", HIPPOCAMPUS)
def test_torch_gives_nnunets_labels_from_the_exported_file(
    hippocampus_bundle: Bundle, shared_root: Path, case: str
) -> None:
    reference = shared_root / "reference"
    volume = read_nifti([reference / "inputs" / f"{IMAGES[0]}_0000.nii.gz"])
    with Predictor(hippocampus_bundle, choice=TORCH) as predictor:
        result = predictor.predict(volume, **HIPPOCAMPUS[case])
    assert result.runtime.backend == "torch"
    check(result, reference / "predictions" / case / f"{IMAGES[0]}.nii.gz")


@pytest.mark.parametrize("image", IMAGES[:3])
def test_bf16_keeps_to_its_tolerance(hippocampus_bundle: Bundle, shared_root: Path, image: str) -> None:
    """What `seggate models tune --tolerance 1e-2` may choose."""
    if not probe("openvino", "cpu", "bf16").is_available:
        pytest.skip("this processor has no bf16")
    reference = shared_root / "reference"
    volume = read_nifti([reference / "inputs" / f"{image}_0000.nii.gz"])
    with Predictor(hippocampus_bundle, choice=BF16) as predictor:
        result = predictor.predict(volume, **HIPPOCAMPUS["3d_fold0_mirror"])
    assert result.runtime.precision == "bf16"
    wanted = reference / "predictions" / "3d_fold0_mirror" / f"{image}.nii.gz"
    check(result, wanted, limits=Limits.of(BF16_TOLERANCE))


def test_a_turned_image_gets_the_same_labels_when_the_contract_turns_it_back(
    hippocampus_bundle: Bundle, shared_root: Path, tmp_path: Path
) -> None:
    """The training images are stored as RAS: with that contract, the order of the file does not matter."""
    folder = shared_root / "models" / "Dataset004_Hippocampus" / "nnUNetTrainer__nnUNetSmallPlans__3d_fullres"
    card = ModelCard(contract={"orientation": "RAS"})
    bundle = import_model(folder, tmp_path / "bundle", card=card, folds=["0"], name="reference", phantoms=False)
    volume = read_nifti([shared_root / "reference" / "inputs" / "hippocampus_023_0000.nii.gz"])
    turned, change = volume.reoriented("PSR")
    with Predictor(bundle, device="cpu", threads=2) as predictor:
        result = predictor.predict(turned, mirroring=False)
    with Predictor(hippocampus_bundle, device="cpu", threads=2) as predictor:
        straight = predictor.predict(volume, **HIPPOCAMPUS["3d_fold0_plain"])
    np.testing.assert_array_equal(change.restore(result.labels.array), straight.labels.array)


@pytest.mark.requirement("INF-34", open="a smaller batch of windows, a CPU in place of a GPU")
def test_a_real_volume_that_does_not_fit_is_refused_before_it_starts(ct: Predictor, shared_root: Path) -> None:
    volume = read_nifti([shared_root / "reference" / "inputs_ct" / "ct_torso_0000.nii.gz"])
    with pytest.raises(MemoryExceeded, match="200 MiB may be used"):
        ct.predict(volume, budget_bytes=200 * 2**20)
