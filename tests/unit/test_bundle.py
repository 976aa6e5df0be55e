"""engine.bundle: what is written is what is read, and nothing changed, added or led astray is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import Bundle, load_bundle, write_bundle
from engine.calibration import calibrate
from engine.calibration_file import calibration_document
from engine.errors import BundleInvalid
from engine.evidence import write_evidence
from gateway.demo.make_model import MODEL
from tests.support.known_cases import drawn


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the demo model, a real bundle."""
    return Path(shutil.copytree(MODEL, tmp_path / "bundle"))


def _edit(root: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((root / "bundle.json").read_text())
    edit(document)
    (root / "bundle.json").write_text(json.dumps(document))


def _replace_file(root: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of the bundle and list its new hash, as somebody who means it would."""
    content = json.loads((root / name).read_text())
    edit(content)
    (root / name).write_text(json.dumps(content))
    digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
    _edit(root, lambda document: document["files"].update({name: digest}))


def _written_again(bundle: Bundle, root: Path) -> Bundle:
    """The bundle's content written anew at `root`, by way of write_bundle."""
    for configuration in bundle.configurations:
        for fold in configuration.folds:
            target = root / fold.file.relative_to(bundle.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(fold.file, target)
    write_evidence(root, bundle.evidence)
    if (bundle.root / "sanity").is_dir():
        shutil.copytree(bundle.root / "sanity", root / "sanity", dirs_exist_ok=True)
    moved = tuple(
        replace(
            configuration,
            folds=tuple(replace(fold, file=fold.file.relative_to(bundle.root)) for fold in configuration.folds),
        )
        for configuration in bundle.configurations
    )
    return write_bundle(
        root,
        replace(bundle, configurations=moved),
        plans_json=json.loads((bundle.root / "plans.json").read_text()),
        dataset_json=bundle.dataset_json.copy(),  # type: ignore[attr-defined]
        fingerprint_json=json.loads((bundle.root / "fingerprint.json").read_text()),
        postprocessing=None if bundle.postprocessing is None else dict(bundle.postprocessing),
        calibration_json=None if bundle.calibration is None else calibration_document(bundle.calibration),
    )


def test_written_bundle_reads_back_equal_and_byte_for_byte_the_same(root: Path, tmp_path: Path) -> None:
    bundle = load_bundle(root)
    again = _written_again(bundle, tmp_path / "again")
    for path in sorted(root.rglob("*")):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(root)).read_bytes() == path.read_bytes(), path.name
    assert again.labels == bundle.labels
    assert again.contract == bundle.contract
    assert again.weights_digest == bundle.weights_digest
    assert again.configuration_digest == bundle.configuration_digest
    assert again.configurations[0].folds[0].file.is_file()


def test_what_a_contract_allows_is_written_and_read_back(root: Path, tmp_path: Path) -> None:
    bundle = load_bundle(root)
    contract = replace(bundle.contract, allow_mixed_contents=True, allow_partial_extent=True)
    assert _written_again(replace(bundle, contract=contract), tmp_path / "again").contract == contract


@pytest.mark.requirement("INF-35", open="licence enforced, GPU named")
def test_digests_name_weights_and_configuration_apart(root: Path) -> None:
    before = load_bundle(root)
    lines = sorted(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(root).as_posix()}\n"
        for file in root.rglob("*.onnx")
    )
    assert before.weights_digest == hashlib.sha256("".join(lines).encode()).hexdigest()

    _edit(root, lambda document: document.update(description="another text", parity=[]))
    described = load_bundle(root)
    assert described.configuration_digest == before.configuration_digest

    _edit(root, lambda document: document.update(step_size=0.25))
    stepped = load_bundle(root)
    assert stepped.weights_digest == before.weights_digest
    assert stepped.configuration_digest != before.configuration_digest

    _replace_file(root, "plans.json", lambda plans: plans.update(plans_name="other"))
    assert load_bundle(root).configuration_digest != stepped.configuration_digest


@pytest.mark.requirement("ART-16")
def test_a_calibration_is_a_listed_file_of_the_bundle_and_part_of_its_digest(root: Path) -> None:
    before = load_bundle(root)
    assert before.calibration is not None
    assert list(before.calibration.labels) == ["Anterior", "Posterior"]
    document = calibration_document(calibrate({"Anterior": drawn(1, 20)}))
    again = write_bundle(
        root,
        before,
        plans_json=json.loads((root / "plans.json").read_text()),
        dataset_json=json.loads((root / "dataset.json").read_text()),
        calibration_json=document,
    )
    assert again.calibration is not None
    assert list(again.calibration.labels) == ["Anterior"]
    assert calibration_document(again.calibration) == document
    assert again.weights_digest == before.weights_digest
    assert again.configuration_digest != before.configuration_digest
    assert "calibration.json" in json.loads((root / "bundle.json").read_text())["files"]

    _replace_file(root, "calibration.json", lambda content: content.update(features_version=99))
    with pytest.raises(BundleInvalid, match=r"calibration\.json: features_version: 99 is unknown"):
        load_bundle(root)
    (root / "calibration.json").write_text("{}")
    with pytest.raises(BundleInvalid, match=r"calibration\.json: SHA-256"):
        load_bundle(root)


@pytest.mark.requirement("INF-35", open="licence enforced, GPU named")
@pytest.mark.parametrize("name", ["3d_fullres/fold_0.onnx", "plans.json", "dataset.json", "fingerprint.json"])
def test_one_changed_byte_in_any_file_is_refused(root: Path, name: str) -> None:
    data = bytearray((root / name).read_bytes())
    data[len(data) // 2] ^= 1
    (root / name).write_bytes(bytes(data))
    with pytest.raises(BundleInvalid, match=rf"{name}: SHA-256"):
        load_bundle(root)


def test_without_verify_contents_are_not_hashed_but_files_must_be_there(root: Path) -> None:
    with (root / "3d_fullres" / "fold_0.onnx").open("ab") as stream:
        stream.write(b"x")
    load_bundle(root, verify=False)
    (root / "3d_fullres" / "fold_0.onnx").unlink()
    with pytest.raises(BundleInvalid, match="missing"):
        load_bundle(root, verify=False)


def test_file_that_is_not_listed_is_refused(root: Path) -> None:
    (root / "3d_fullres" / "extra.onnx").write_bytes(b"x")
    with pytest.raises(BundleInvalid, match=r"3d_fullres/extra\.onnx: not listed"):
        load_bundle(root)


def test_link_is_refused_even_with_the_right_content(root: Path, tmp_path: Path) -> None:
    file = root / "3d_fullres" / "fold_0.onnx"
    file.rename(tmp_path / "outside.onnx")
    file.symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleInvalid, match="links are not allowed"):
        load_bundle(root)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/passwd", "a/../b", "a//b", "./a", "a\\b", "", ".hidden", "bundle.json"]
)
def test_listed_path_that_is_not_plain_is_refused(root: Path, name: str) -> None:
    _edit(root, lambda document: document["files"].update({name: "0" * 64}))
    with pytest.raises(BundleInvalid, match="plain relative path"):
        load_bundle(root)


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_unknown_schema_version_is_refused(root: Path, version: object) -> None:
    _edit(root, lambda document: document.update(schema_version=version))
    with pytest.raises(BundleInvalid, match="schema_version"):
        load_bundle(root)


def _in(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_in("name", value="../x"), "name"),
        (_in("name", value="A"), "name"),
        (_in("semver", value="1.0"), "semver"),
        (_in("semver", value="1.0.0-rc.1"), "semver"),
        (_in("semver", value="1.0.0\n"), "semver"),
        (_in("semver", value="1000000.0.0"), "semver"),
        (_in("name", value="a" * 64), "name"),
        (_in("ensemble", value="logits"), "ensemble"),
        (_in("step_size", value=float(10**9)), "step_size"),
        (_in("weights", value="int8"), "weights"),
        (_in("channels", value=[]), "channels"),
        (_in("channels", value=[{"index": 0, "name": "a"}, {"index": 1, "name": "b"}]), "channels"),
        (_in("labels", 0, "value", value=3), "labels"),
        (_in("labels", 0, "name", value="Other"), "labels"),
        (_in("labels", 0, "pair", value="Nobody"), "pair"),
        (_in("labels", 0, "pair", value="Posterior"), "bundle.json: labels: Anterior: pair: .* name each other"),
        (_in("labels", 0, "laterality", value="both"), "laterality"),
        (_in("labels", 0, "colour", value=[1, 2]), "colour"),
        (_in("labels", 0, "volume_range_ml", value=[2, 1]), "volume_range_ml"),
        (_in("labels", 0, "type", "value", value="1\\2"), "type: value"),
        (_in("contract", "orientation", value="LRS"), "orientation"),
        (_in("contract", "modalities", value=[]), "modalities"),
        (_in("configurations", 0, "name", value="3d_lowres"), "3d_lowres"),
        (_in("configurations", 0, "mirror_axes", value=[0, 0]), "mirror_axes"),
        (_in("configurations", 0, "mirror_axes", value=[3]), "mirror_axes"),
        (_in("configurations", 0, "previous_stage", value="3d_lowres"), "previous_stage"),
        (_in("configurations", 0, "folds", value=[]), "folds"),
        (_in("configurations", 0, "folds", 0, "file", value="../fold_0.onnx"), "plain relative path"),
        (_in("configurations", 0, "folds", 0, "file", value="3d_fullres/fold_9.onnx"), "not listed"),
        (_in("quality", "max_components", value={"Nobody": 1}), "max_components"),
        (_in("quality", "min_confidence", value="high"), "min_confidence"),
        (_in("files", "plans.json", value="ABC"), "SHA-256"),
        (_in("parity", 0, "max_abs_difference", value=-1), "max_abs_difference"),
    ],
)
def test_value_of_wrong_type_range_or_reference_is_refused_with_its_key(
    root: Path, edit: Callable[[dict[str, Any]], None], named: str
) -> None:
    _edit(root, edit)
    with pytest.raises(BundleInvalid, match=named):
        load_bundle(root)


def test_previous_stages_in_a_circle_are_refused(root: Path) -> None:
    _replace_file(root, "plans.json", lambda p: p["configurations"]["3d_fullres"].update(previous_stage="3d_fullres"))
    _edit(root, _in("configurations", 0, "previous_stage", value="3d_fullres"))
    with pytest.raises(BundleInvalid, match="circle"):
        load_bundle(root)


def test_plans_that_are_refused_make_the_bundle_invalid(root: Path) -> None:
    _replace_file(root, "plans.json", lambda plans: plans.update(label_manager="os.system"))
    with pytest.raises(BundleInvalid, match="label_manager"):
        load_bundle(root)


def test_absent_or_torn_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match=r"bundle\.json"):
        load_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text('{"schema_version": 1')
    with pytest.raises(BundleInvalid, match=r"bundle\.json"):
        load_bundle(tmp_path)


def test_demo_model_says_what_it_is(root: Path) -> None:
    bundle = load_bundle(root)
    assert (bundle.name, bundle.semver) == ("hippocampus-mr", "1.0.0")
    assert "CC BY-SA 4.0" in bundle.licence
    assert "Trained by seggate on 200 cases" in bundle.origin
    assert bundle.contract.orientation == "RAS"
    assert [fold.fold for fold in bundle.final_configurations[0].folds] == ["0", "1", "2", "3", "4"]
    assert bundle.configuration("3d_fullres").mirror_axes == (2,)
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) <= 8 * 2**20
    with pytest.raises(BundleInvalid, match="no configuration"):
        bundle.configuration("2d")
