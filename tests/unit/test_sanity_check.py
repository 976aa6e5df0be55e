"""engine.sanity_check and engine.sanity_cases: what torch gave at export is what must come out, within one rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.array_archive import write_arrays
from engine.bundle import Bundle, load_bundle, write_bundle
from engine.errors import BundleInvalid, ImportRefused
from engine.evidence import Evidence, write_evidence
from engine.onnx_backend import OnnxBackend
from engine.phantom_planning import plan_phantoms
from engine.predictor import Predictor
from engine.sanity_cases import (
    CASES_JSON,
    LoadedSanityCase,
    SanityCase,
    SanitySuite,
    load_case,
    read_suite,
    suite_document,
)
from engine.sanity_check import check_sanity, compare
from engine.sanity_making import SiteCase, make_sanity, read_site_folder
from engine.sanity_phantom import make_phantom
from engine.volume import Geometry, LabelMap, Volume
from tests.support.raw_datasets import write_array
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle

PATCH = (4, 8, 8)
SHAPE = (20, 40, 50)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = _without_sanity(tmp_path_factory.mktemp("original") / "bundle")
    suite = make_sanity(made, _networks(made), phantoms=True, site_cases=[_site()], progress=_quiet)
    return _with_sanity(made, suite).root


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Bundle:
    """Labels by brightness: 1 above the mean, 2 far above it. Its sanity cases: three phantoms and one of the site."""
    return load_bundle(Path(shutil.copytree(original, tmp_path / "bundle")))


def _without_sanity(root: Path) -> Bundle:
    weights, bias = np.array([[0.0], [4.0], [8.0]]), np.array([0.0, -1.0, -6.0])
    write_pointwise_network(root / "3d_fullres" / "fold_0.onnx", weights, bias, PATCH)
    configuration = configuration_json(PATCH, (3.0, 1.0, 1.0), schemes=["ZScoreNormalization"])
    return write_tiny_bundle(
        root,
        labels={"background": 0, "a": 1, "b": 2},
        configurations={"3d_fullres": configuration},
        mirror_axes=(0, 1, 2),
        orientation="RAS",
    )


def _networks(bundle: Bundle) -> dict[tuple[str, str], OnnxBackend]:
    file = bundle.configurations[0].folds[0].file
    return {("3d_fullres", "0"): OnnxBackend(file, channels=1, patch_size=PATCH, device="cpu", threads=1)}


def _with_sanity(bundle: Bundle, suite: SanitySuite) -> Bundle:
    write_evidence(bundle.root, Evidence(sanity=suite))
    return write_bundle(
        bundle.root,
        bundle,
        plans_json=json.loads((bundle.root / "plans.json").read_text()),
        dataset_json=json.loads((bundle.root / "dataset.json").read_text()),
    )


def _site() -> SiteCase:
    random = np.random.default_rng(0)
    geometry = Geometry(shape=(6, 9, 7), affine_lps=np.diag([1.0, 1.2, 3.0, 1.0]))
    array = random.integers(1, 1000, (1, 6, 9, 7)).astype(np.float32)
    reference = LabelMap(array=(array[0] > 600).astype(np.uint8), geometry=geometry)
    return SiteCase(name="somebody", volume=Volume(array=array, geometry=geometry), reference=reference)


def _quiet(_share: float, _text: str) -> None:
    return None


@pytest.mark.requirement("ART-13", open="a GPU")
def test_a_bundle_gives_again_what_it_gave_at_its_export(bundle: Bundle) -> None:
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        shares: list[float] = []
        found = check_sanity(predictor, progress=shares.append)
    assert [case.name for case in found] == ["plans-grid", "thick-slices", "turned", "site-1"]
    for case in found:
        assert (case.changed, case.faults, case.lowest_dice) == (0, (), 1.0)
    assert found[3].reference_dice is not None
    assert found[0].reference_dice is None
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_cases_have_every_label_their_figures_and_nobodys_name(bundle: Bundle) -> None:
    suite = bundle.evidence.sanity
    assert suite is not None
    for case in suite.cases:
        assert all(case.voxels.values())
    site = suite.cases[3]
    assert site.dice is not None
    assert site.dice["a"] is not None
    assert "somebody" not in (bundle.root / CASES_JSON).read_text()
    loaded = load_case(bundle.root, site, channels=1, highest=2)
    assert np.array_equal(loaded.volume.array, _site().volume.array)
    assert np.array_equal(loaded.volume.geometry.affine_lps, _site().volume.geometry.affine_lps)


def test_the_same_cases_are_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    made = _without_sanity(tmp_path / "again")
    make_sanity(made, _networks(made), phantoms=True, site_cases=[_site()], progress=_quiet)
    for name in ("plans-grid", "thick-slices", "turned", "site-1"):
        path = f"sanity/{name}.npz"
        assert (made.root / path).read_bytes() == (bundle.root / path).read_bytes()


def test_phantoms_lie_on_the_plans_grid_once_with_thick_slices_once_turned_and_tilted(bundle: Bundle) -> None:
    planned = dict(plan_phantoms(bundle))
    plain, thick, turned = (make_phantom(planned[name]) for name in ("plans-grid", "thick-slices", "turned"))
    assert plain.geometry.spacing_mm == pytest.approx((3.0, 1.0, 1.0))
    assert plain.geometry.orientation == "RAS"
    assert thick.geometry.spacing_mm == pytest.approx((9.0, 1.0, 1.0))
    assert turned.geometry.orientation not in ("RAS", "LPS")
    assert not np.allclose(np.abs(turned.geometry.direction).max(axis=0), 1.0)
    assert max(turned.reoriented("RAS")[0].geometry.shape[1:]) > PATCH[1]


def test_a_network_that_answers_otherwise_is_found_with_figures(bundle: Bundle) -> None:
    file = bundle.configurations[0].folds[0].file
    write_pointwise_network(file, np.array([[0.0], [4.0], [8.0]]), np.array([0.0, -1.6, -6.0]), PATCH)
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        found = check_sanity(predictor)
    assert "voxels changed (at most 1 in 10,000)" in found[0].faults[0]
    assert "a: Dice 0." in found[0].faults[1]
    assert any("to the reference" in fault for fault in found[3].faults)


def test_a_bundle_without_cases_has_nothing_to_check(tmp_path: Path) -> None:
    with Predictor(_without_sanity(tmp_path / "b"), device="cpu", threads=1) as predictor:
        assert check_sanity(predictor) == ()


def _big(changed: int, *, of: int) -> tuple[SanityCase, LoadedSanityCase, NDArray[np.uint8]]:
    """A case in which label 1 has `of` voxels, and an answer that lacks `changed` of them."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels.ravel()[:of] = 1
    answer = labels.copy()
    answer.ravel()[:changed] = 0
    geometry = Geometry(shape=SHAPE, affine_lps=np.eye(4))
    volume = Volume(array=np.ones((1, *SHAPE), dtype=np.float32), geometry=geometry)
    case = SanityCase(name="x", phantom=None, image_sha256=None, geometry=geometry, voxels={"a": of, "b": 0}, dice=None)
    loaded = LoadedSanityCase(volume=volume, labels=LabelMap(array=labels, geometry=geometry), reference=None)
    return case, loaded, answer


@pytest.mark.parametrize(
    ("changed", "of", "faults"),
    [(0, 20_000, 0), (4, 20_000, 0), (5, 20_000, 1), (2, 100, 0), (3, 100, 1), (2, 2, 0), (3, 3, 1), (4, 4000, 0)],
)
def test_the_rule(bundle: Bundle, changed: int, of: int, faults: int) -> None:
    """40,000 voxels: 4 may change; a label may lose 0.001 of its Dice, or two voxels."""
    case, loaded, answer = _big(changed, of=of)
    assert len(compare(case, loaded, answer, bundle.labels).faults) == faults


def test_labels_that_are_not_those_of_the_figures_are_refused(bundle: Bundle) -> None:
    case, loaded, answer = _big(0, of=100)
    with pytest.raises(BundleInvalid, match="not the voxels that x is said to have"):
        compare(replace(case, voxels={"a": 99, "b": 0}), loaded, answer, bundle.labels)


def test_a_label_that_the_model_lacks_is_refused(bundle: Bundle) -> None:
    assert bundle.evidence.sanity is not None
    case = bundle.evidence.sanity.cases[0]
    assert case.phantom is not None
    write_arrays(bundle.root / case.file, {"labels": np.full(case.phantom.shape, 65535, dtype=np.uint16)})
    with pytest.raises(BundleInvalid, match="label 65535"):
        load_case(bundle.root, case, channels=1, highest=2)


def test_a_phantom_of_another_release_is_refused(bundle: Bundle) -> None:
    assert bundle.evidence.sanity is not None
    case = replace(bundle.evidence.sanity.cases[0], image_sha256="0" * 64)
    with pytest.raises(BundleInvalid, match="not the one of the export"):
        load_case(bundle.root, case, channels=1, highest=2)


@pytest.mark.parametrize("name", ["turned.npz", "cases.json"])
def test_cases_without_arrays_and_arrays_without_a_case_are_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(bundle.root, tmp_path / "copy"))
    (root / "sanity" / name).unlink()
    document = json.loads((root / "bundle.json").read_text())
    del document["files"][f"sanity/{name}"]
    (root / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleInvalid, match="sanity/"):
        load_bundle(root)


def _at(*path: str | int, value: object) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_at("format", value=2), "format"),
        (_at("cases", value=[]), "cases"),
        (_at("cases", 0, "name", value="../x"), "name"),
        (_at("cases", 0, "name", value="turned"), "twice"),
        (_at("cases", 0, "voxels", "a", value=-1), "voxels"),
        (_at("cases", 0, "voxels", "c", value=1), "no label"),
        (_at("cases", 0, "phantom", "shape", value=[10**4, 2, 2]), "shape"),
        (_at("cases", 0, "phantom", "shape", value=[1000, 1000, 1000]), "voxels"),
        (_at("cases", 0, "phantom", "seed", value=-1), "seed"),
        (_at("cases", 0, "phantom", "orientation", value="LRS"), "orientation"),
        (_at("cases", 0, "phantom", "ranges", value=[[0, 1], [0, 1]]), "ranges"),
        (_at("cases", 0, "phantom", "ranges", 0, value=[0, "x"]), "ranges"),
        (_at("cases", 0, "image_sha256", value="x"), "image_sha256"),
        (_at("cases", 0, "dice", value={"a": 1.0, "b": 1.0}), "a phantom has no reference"),
        (_at("cases", 3, "dice", "a", value=1.5), "dice"),
        (_at("cases", 3, "shape", value=[8000, 8000, 8000]), "voxels"),
        (_at("cases", 3, "affine_lps", value=[[0] * 4] * 4), "affine"),
        (_at("cases", 3, "affine_lps", 0, value=[1e300, 0, 0, 0]), "affine_lps"),
    ],
)
def test_a_value_of_wrong_type_or_range_is_refused_with_its_key(
    bundle: Bundle, edit: Callable[[Any], None], named: str
) -> None:
    assert bundle.evidence.sanity is not None
    document = json.loads(json.dumps(suite_document(bundle.evidence.sanity)))
    assert read_suite(document, labels=["a", "b"], channels=1, error=BundleInvalid).cases[0].name == "plans-grid"
    edit(document)
    with pytest.raises(BundleInvalid, match=named):
        read_suite(document, labels=["a", "b"], channels=1, error=BundleInvalid)


def test_a_folder_of_the_site_is_read_with_or_without_references(tmp_path: Path) -> None:
    image = np.ones((3, 4, 5), dtype=np.float32)
    for name in ("one", "two"):
        write_array(tmp_path / f"{name}_0000.nii.gz", image)
    write_array(tmp_path / "two.nii.gz", np.ones((3, 4, 5), dtype=np.uint8))
    cases = read_site_folder(tmp_path, channels=1)
    assert [(case.name, case.reference is not None) for case in cases] == [("one", False), ("two", True)]
    with pytest.raises(ImportRefused, match=r"one_0001\.nii\.gz"):
        read_site_folder(tmp_path, channels=2)
    with pytest.raises(ImportRefused, match=r"holds no CASE_0000\.nii\.gz"):
        read_site_folder(tmp_path / "absent", channels=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c, reference=LabelMap(array=np.full((6, 9, 7), 9), geometry=c.volume.geometry)), "has 9"),
        (
            lambda c: replace(
                c,
                reference=LabelMap(
                    array=np.zeros((6, 9, 7), dtype=np.uint8),
                    geometry=Geometry(shape=(6, 9, 7), affine_lps=np.diag([1.0, -1.2, 3.0, 1.0])),
                ),
            ),
            "the reference: axes run",
        ),
        (
            lambda c: replace(c, volume=Volume(array=np.ones((2, 6, 9, 7), np.float32), geometry=c.volume.geometry)),
            r"2 channel\(s\)",
        ),
    ],
)
def test_a_case_of_the_site_that_does_not_fit_is_refused_with_its_name(
    tmp_path: Path, change: Callable[[SiteCase], SiteCase], named: str
) -> None:
    made = _without_sanity(tmp_path / "b")
    with pytest.raises(ImportRefused, match=f"somebody: .*{named}"):
        make_sanity(made, _networks(made), phantoms=False, site_cases=[change(_site())], progress=_quiet)
