"""engine.export and engine.onnx_graph: every kind of model becomes a bundle that computes the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import load_bundle
from engine.errors import ImportRefused, MemoryExceeded, ParityFailed
from engine.model_card import parse_card
from tests.support.peers import require_peer, shared_root

require_peer("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402

from engine import export, onnx_graph  # noqa: E402
from engine import parity as parity_module  # noqa: E402
from engine.checkpoint import load_network, read_checkpoint  # noqa: E402
from engine.export import import_model  # noqa: E402
from engine.labels import LabelManager  # noqa: E402
from engine.onnx_graph import write_onnx  # noqa: E402
from engine.parity import check_parity  # noqa: E402
from engine.plans import Configuration, read_plans  # noqa: E402
from tests.support.nnunet_results import (  # noqa: E402
    TWO_D,
    TrainedModel,
    checkpoint_content,
    dataset_json,
    plans_json,
    write_results,
)

RESIDUAL = TrainedModel(network="ResidualEncoderUNet")
REGIONS = TrainedModel(
    labels={"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, regions_class_order=(1, 2), heads=2
)
CHANNELS = TrainedModel(channels=("T1", "T2", "FLAIR"), network="ResidualEncoderUNet")
IGNORE = TrainedModel(labels={"background": 0, "liver": 1, "spleen": 2, "ignore": 3})
LOWRES = TrainedModel(name="3d_lowres", spacing=(4.0, 2.0, 2.0))
CASCADE = TrainedModel(name="3d_cascade_fullres", previous_stage="3d_lowres", extra_channels=2)


@pytest.mark.requirement("ART-13", open="a GPU")
@pytest.mark.parametrize(
    "model",
    [TrainedModel(), RESIDUAL, TWO_D, replace(TWO_D, network="ResidualEncoderUNet"), REGIONS, CHANNELS, IGNORE],
    ids=["plain", "residual", "2D", "residual 2D", "regions and ignore", "three channels", "ignore"],
)
def test_every_kind_of_network_is_exported_with_proven_parity(tmp_path: Path, model: TrainedModel) -> None:
    write_results(tmp_path / "Dataset901_Tiny", model, folds=(0, 1))
    bundle = import_model(tmp_path / "Dataset901_Tiny", tmp_path / "bundle")
    assert bundle.name == "tiny"
    assert bundle.root == tmp_path / "bundle"
    assert bundle.label_manager.num_heads == model.heads
    assert bundle.configurations[0].mirror_axes == model.mirror_axes
    assert len(bundle.parity) == 2
    for parity in bundle.parity:
        assert parity.max_abs_difference < 1e-3
        assert parity.argmax_agreement >= 0.9999
    assert load_bundle(bundle.root).weights_digest == bundle.weights_digest


def test_folds_with_different_mirror_axes_are_mirrored_along_those_that_all_have(tmp_path: Path) -> None:
    model = TrainedModel()
    folder = write_results(tmp_path / "D", model, folds=(0, 1))
    other = checkpoint_content(replace(model, mirror_axes=(0, 1)), plans=plans_json(model), fold=1)
    torch.save(other, folder / "fold_1" / "checkpoint_final.pth")
    notices: list[str] = []
    bundle = import_model(tmp_path / "D", tmp_path / "bundle", notice=notices.append)
    assert len(bundle.configurations[0].folds) == 2
    assert bundle.configurations[0].mirror_axes == (0, 1)
    assert any("different mirror axes" in notice for notice in notices)


def test_cascade_brings_its_previous_stage_and_one_channel_per_label(tmp_path: Path) -> None:
    plans = plans_json(LOWRES, CASCADE)
    write_results(tmp_path / "D", LOWRES, plans=plans)
    folder = write_results(tmp_path / "D", CASCADE, plans=plans)
    bundle = import_model(folder, tmp_path / "bundle")
    assert [c.name for c in bundle.configurations] == ["3d_cascade_fullres", "3d_lowres"]
    assert [c.name for c in bundle.final_configurations] == ["3d_cascade_fullres"]
    graph = onnx.load(bundle.configuration("3d_cascade_fullres").folds[0].file).graph
    assert graph.input[0].type.tensor_type.shape.dim[1].dim_value == 3


def test_old_plans_format_gives_the_same_network(tmp_path: Path) -> None:
    model = TrainedModel(features=(4, 8, 8))
    write_results(tmp_path / "new", model)
    write_results(tmp_path / "old", model, plans=plans_json(model, old=True))
    new = import_model(tmp_path / "new", tmp_path / "a")
    old = import_model(tmp_path / "old", tmp_path / "b")
    assert new.weights_digest == old.weights_digest


def test_same_model_gives_the_same_bytes_but_for_times(tmp_path: Path) -> None:
    write_results(tmp_path / "D", TrainedModel())
    first = import_model(tmp_path / "D", tmp_path / "a")
    again = import_model(tmp_path / "D", tmp_path / "b")
    names = {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert names == {
        *("bundle.json", "plans.json", "dataset.json", "provenance.json", "backends.json", "3d_fullres/fold_0.onnx"),
        *(f"sanity/{name}" for name in ("cases.json", "plans-grid.npz", "thick-slices.npz", "turned.npz")),
    }
    for name in names - {"bundle.json", "backends.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    manifests = [json.loads((tmp_path / folder / "bundle.json").read_text()) for folder in ("a", "b")]
    for manifest in manifests:
        del manifest["files"]["backends.json"]
    assert manifests[0] == manifests[1]
    assert (first.weights_digest, first.configuration_digest) == (again.weights_digest, again.configuration_digest)


@pytest.mark.requirement("ART-13", open="a GPU")
def test_the_bundle_says_what_is_expected_of_it_and_how_it_was_measured(tmp_path: Path) -> None:
    write_results(tmp_path / "D", TrainedModel(), folds=(0, 1))
    evidence = import_model(tmp_path / "D", tmp_path / "bundle").evidence
    assert evidence.sanity is not None
    assert evidence.sanity.computed_by.startswith("torch ")
    assert evidence.backends is not None
    measured = [(f.fold, f.backend, f.provider, f.precision) for f in evidence.backends.figures if f.provider == "cpu"]
    assert measured == [
        (fold, backend, "cpu", "float32") for fold in ("0", "1") for backend in ("onnxruntime", "openvino")
    ]
    assert all(figure.seconds_per_window > 0 for figure in evidence.backends.figures)
    assert evidence.provenance is not None
    assert [(fold.fold, fold.trainer, fold.epochs) for fold in evidence.provenance.training] == [
        ("0", "nnUNetTrainer", 1),
        ("1", "nnUNetTrainer", 1),
    ]
    assert evidence.baseline is None


def test_no_names_of_cases_or_patients_leave_with_the_bundle(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "D", TrainedModel())
    document = dataset_json(TrainedModel()) | {"patients": {"case_doe": "Doe"}, "training": ["./imagesTr/doe.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(document))
    fingerprint = {"spacings": [[1, 1, 1]], "seggate": {"num_cases": 1, "cases": {"case_doe": {"labels": [1]}}}}
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    (folder / "fold_0" / "training.json").write_text(json.dumps({"train": ["case_doe"], "val": ["case_roe"]}))
    bundle = import_model(folder, tmp_path / "bundle")
    assert bundle.evidence.provenance is not None
    assert bundle.evidence.provenance.data.cases == 2
    for path in bundle.root.rglob("*.json"):
        assert not any(name in path.read_text().casefold() for name in ("doe", "roe")), path.name


def test_weights_in_fp16_halve_the_file_and_are_proven_on_the_sanity_cases(tmp_path: Path) -> None:
    write_results(tmp_path / "D", TrainedModel(features=(16, 32, 32)))
    whole = import_model(tmp_path / "D", tmp_path / "a", phantoms=False)
    half = import_model(tmp_path / "D", tmp_path / "b", weights="fp16")
    assert (whole.weights, half.weights) == ("float32", "fp16")
    assert load_bundle(half.root).weights == "fp16"
    sizes = [bundle.configurations[0].folds[0].file.stat().st_size for bundle in (whole, half)]
    assert sizes[1] < 0.54 * sizes[0]
    assert 0 < half.parity[0].max_abs_difference < 0.05
    assert half.configuration_digest != whole.configuration_digest


def test_weights_in_fp16_that_change_a_sanity_case_are_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path / "D", TrainedModel(seed=2))
    # Rounding as coarse as this stands for a network whose labels hang on the last digits of its weights.
    monkeypatch.setattr(onnx_graph, "to_float16", _coarsely)
    monkeypatch.setattr(parity_module, "to_float16", _coarsely)
    with pytest.raises(ParityFailed, match=r"weights in fp16, differ from torch .* of \d+ voxels changed"):
        import_model(tmp_path / "D", tmp_path / "models" / "bundle", weights="fp16")
    assert list((tmp_path / "models").iterdir()) == []


def _coarsely(_name: str, array: Any) -> Any:
    return (np.round(array * 4) / 4).astype(np.float16)


def test_weights_in_fp16_need_a_sanity_case(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="proven on the sanity cases"):
        import_model(tmp_path / "any", tmp_path / "bundle", weights="fp16", phantoms=False)


def test_card_and_arguments_name_the_bundle_and_notices_reach_the_caller(tmp_path: Path) -> None:
    write_results(tmp_path / "D", TrainedModel())
    notices: list[str] = []
    shares: list[float] = []
    bundle = import_model(
        tmp_path / "D",
        tmp_path / "bundle",
        semver="2.1.0",
        card=parse_card({"name": "from-card", "semver": "9.9.9", "licence": "CC0"}),
        progress=lambda share, _text: shares.append(share),
        notice=notices.append,
    )
    assert (bundle.name, bundle.semver, bundle.licence) == ("from-card", "2.1.0", "CC0")
    assert shares[-1] == 1.0
    assert any("orientation" in notice for notice in notices)
    assert not any("licence" in notice for notice in notices)


def test_postprocessing_of_nnunet_goes_into_the_bundle_without_its_paths(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "D", TrainedModel())
    crossval = folder / "crossval_results_folds_0"
    crossval.mkdir()
    (crossval / "postprocessing.json").write_text(
        json.dumps(
            {
                "input_folder": "/home/somebody/results",
                "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
                "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}],
            }
        )
    )
    bundle = import_model(folder, tmp_path / "bundle")
    assert bundle.postprocessing is not None
    assert bundle.postprocessing["postprocessing_kwargs"] == [{"labels_or_regions": [1, 2], "background_label": 0}]
    assert "somebody" not in (tmp_path / "bundle" / "postprocessing.json").read_text()


def _network_and_configuration(tmp_path: Path) -> tuple[Any, Configuration, LabelManager]:
    model = TrainedModel()
    folder = write_results(tmp_path / "D", model)
    configuration = read_plans(plans_json(model)).configurations["3d_fullres"]
    checkpoint = read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    network = load_network(checkpoint, configuration.architecture, channels=1, heads=3, where="fold 0")
    return network, configuration, LabelManager.from_dataset_json(dataset_json(model))


def _write(path: Path, network: Any, configuration: Configuration, **limits: Any) -> list[Path]:
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    return write_onnx(
        path,
        configuration.architecture,
        weights,
        channels=1,
        heads=3,
        patch_size=configuration.patch_size,
        **limits,
    )


def test_large_weights_lie_beside_the_graph(tmp_path: Path) -> None:
    network, configuration, labels = _network_and_configuration(tmp_path)
    written = _write(tmp_path / "n.onnx", network, configuration, external_data_bytes=1000)
    assert [path.name for path in written] == ["n.onnx", "n.onnx.data"]
    found = check_parity(network, tmp_path / "n.onnx", configuration, channels=1, label_manager=labels, fold="0")
    assert found.parity.max_abs_difference < 1e-4


def test_graph_is_small_names_no_path_and_takes_any_batch(tmp_path: Path) -> None:
    network, configuration, _ = _network_and_configuration(tmp_path)
    _write(tmp_path / "n.onnx", network, configuration)
    model = onnx.load(tmp_path / "n.onnx")
    assert model.opset_import[0].version == 17
    weights = sum(value.numel() * 4 for name, value in network.state_dict().items() if "seg_layers.0" not in name)
    size = (tmp_path / "n.onnx").stat().st_size
    assert weights < size < weights + 20_000
    names = [initializer.name for initializer in model.graph.initializer]
    assert len(names) == len(set(names))
    assert b"/" not in b"".join(node.SerializeToString() for node in model.graph.node)
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx", providers=["CPUExecutionProvider"])
    image = np.zeros((3, 1, *configuration.patch_size), dtype=np.float32)
    assert session.run(None, {"image": image})[0].shape == (3, 3, *configuration.patch_size)


def test_nothing_is_left_behind_when_the_import_is_refused(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "D", TrainedModel(), folds=(0, 1))
    content = torch.load(folder / "fold_1" / "checkpoint_final.pth", weights_only=False)
    del content["network_weights"]["decoder.seg_layers.1.bias"]
    torch.save(content, folder / "fold_1" / "checkpoint_final.pth")
    with pytest.raises(ImportRefused, match=r"3d_fullres fold 1: parameter decoder\.seg_layers\.1\.bias is missing"):
        import_model(folder, tmp_path / "models" / "bundle")
    assert list((tmp_path / "models").iterdir()) == []


def test_existing_target_is_not_touched(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "D", TrainedModel())
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ImportRefused, match="exists already"):
        import_model(folder, tmp_path / "bundle")
    assert list((tmp_path / "bundle").iterdir()) == []


def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "D", TrainedModel(), plans=plans_json(TrainedModel(), LOWRES))
    folder.rename(folder.with_name("nnUNetTrainer__nnUNetPlans__3d_lowres"))
    with pytest.raises(ImportRefused, match="trained as '3d_fullres'"):
        import_model(tmp_path / "D", tmp_path / "bundle")


def test_network_that_does_not_fit_into_memory_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_results(tmp_path / "D", TrainedModel())
    monkeypatch.setattr(export, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryExceeded, match="GiB"):
        import_model(folder, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "semver"), [("../x", None), ("Ä", None), (None, "1"), (None, "1.0.0/.."), (None, "1.0.0-rc.1")]
)
def test_name_and_version_that_could_lead_astray_are_refused(
    tmp_path: Path, name: str | None, semver: str | None
) -> None:
    folder = write_results(tmp_path / "D", TrainedModel())
    with pytest.raises(ImportRefused, match=r"name|semver"):
        import_model(folder, tmp_path / "bundle", name=name, semver=semver)


def test_a_malformed_version_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(export, "open_result")
    with pytest.raises(ImportRefused, match=r"semver: '1\.0\.0-rc\.1' is not MAJOR\.MINOR\.PATCH"):
        import_model(tmp_path / "any", tmp_path / "bundle", semver="1.0.0-rc.1")


@pytest.mark.requirement("ART-13", open="a GPU")
@pytest.mark.peer("shared-data")
def test_a_folder_of_nnunet_and_its_zip_give_the_same_bundle(tmp_path: Path) -> None:
    models = shared_root() / "models"
    made = [
        import_model(models / path, tmp_path / path, configurations=["3d_fullres"])
        for path in ("Dataset004_Hippocampus", "hippocampus_3d.zip")
    ]
    assert made[0].weights_digest == made[1].weights_digest
    assert made[0].configuration_digest == made[1].configuration_digest


@pytest.mark.peer("shared-data")
def test_ensemble_of_2d_and_3d_is_imported_from_the_dataset_folder(tmp_path: Path) -> None:
    bundle = import_model(shared_root() / "models" / "Dataset004_Hippocampus", tmp_path / "bundle")
    assert {c.name: (len(c.folds), c.mirror_axes) for c in bundle.final_configurations} == {
        "2d": (1, (0, 1)),
        "3d_fullres": (2, (0, 1, 2)),
    }
    assert all(parity.argmax_agreement == 1.0 for parity in bundle.parity)


@pytest.mark.peer("shared-data")
def test_ct_model_is_imported(tmp_path: Path) -> None:
    bundle = import_model(shared_root() / "models" / "Dataset900_CTsmall", tmp_path / "bundle")
    assert bundle.contract.modalities == ("CT",)
    assert [label.type.meaning for label in bundle.labels] == ["Liver", "Spleen", "Kidney", "Hip", "Bladder"]
