"""engine.checkpoint: nothing of a checkpoint runs, and nothing that does not fit is loaded."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.peers import require_peer, shared_root

require_peer("torch")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from engine.architecture import Architecture  # noqa: E402
from engine.checkpoint import Checkpoint, load_network, read_checkpoint  # noqa: E402
from engine.errors import ImportRefused  # noqa: E402
from engine.plans import read_plans  # noqa: E402
from tests.support.nnunet_results import TrainedModel, checkpoint_content, plans_json  # noqa: E402

MODEL = TrainedModel()


def _save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def _content(**changes: Any) -> dict[str, Any]:
    return {**checkpoint_content(MODEL, plans=plans_json(MODEL)), **changes}


def _architecture() -> Architecture:
    return read_plans(plans_json(MODEL)).configurations["3d_fullres"].architecture


def _load(checkpoint: Checkpoint, heads: int = 3) -> torch.nn.Module:
    return load_network(checkpoint, _architecture(), channels=1, heads=heads, where="fold 0")


class _RunsACommand:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


def test_copies_are_dropped_and_the_network_computes(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(_save(tmp_path / "c.pth", _content()))
    assert not any("all_modules" in name or "decoder.encoder" in name for name in checkpoint.weights)
    assert (checkpoint.trainer, checkpoint.configuration, checkpoint.fold) == ("nnUNetTrainer", "3d_fullres", "0")
    assert checkpoint.mirror_axes == (0, 1, 2)
    network = _load(checkpoint)
    assert not network.training
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 8, 16, 16)).shape == (1, 3, 8, 16, 16)


def test_prefixes_of_data_parallel_and_compiled_models_are_stripped(tmp_path: Path) -> None:
    content = _content()
    content["network_weights"] = {f"_orig_mod.module.{k}": v for k, v in content["network_weights"].items()}
    _load(read_checkpoint(_save(tmp_path / "c.pth", content)))


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    content = _content()
    content["network_weights"] = {k: v.half() for k, v in content["network_weights"].items()}
    network = _load(read_checkpoint(_save(tmp_path / "c.pth", content)))
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_no_mirroring_is_no_axes(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(_save(tmp_path / "c.pth", _content(inference_allowed_mirroring_axes=None)))
    assert checkpoint.mirror_axes == ()


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_of_numpy_1_and_2_are_read(tmp_path: Path, module: bytes) -> None:
    written = _save(tmp_path / "a.pth", _content())
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray\nscalar" in data
                data = data.replace(b"numpy._core.multiarray\nscalar", module + b"\nscalar")
            target.writestr(entry.filename, data)
    assert read_checkpoint(tmp_path / "b.pth").weights


@pytest.mark.parametrize("place", ["logging", "network_weights", "optimizer_state"])
def test_program_in_a_checkpoint_does_not_run_and_is_named(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "it-ran"
    path = _save(tmp_path / "c.pth", _content(**{place: {"x": _RunsACommand(marker)}}))
    with pytest.raises(ImportRefused, match=r"nothing of it was run: it asks for (posix|os)\.system"):
        read_checkpoint(path)
    assert not marker.exists()


def test_bare_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (tmp_path / "c.pth").write_bytes(pickle.dumps(_RunsACommand(marker)))
    with pytest.raises(ImportRefused, match="zip format"):
        read_checkpoint(tmp_path / "c.pth")
    assert not marker.exists()


def test_whole_module_instead_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"torch\.nn\.modules"):
        read_checkpoint(_save(tmp_path / "c.pth", torch.nn.Linear(2, 2)))


def test_compressed_container_is_refused(tmp_path: Path) -> None:
    written = _save(tmp_path / "a.pth", _content())
    with (
        zipfile.ZipFile(written) as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(ImportRefused, match="compressed"):
        read_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize("keep", [0, 100, 5000, -100])
def test_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = _save(tmp_path / "c.pth", _content())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ImportRefused, match=r"c\.pth"):
        read_checkpoint(path)


def test_container_without_a_pickle_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as container:
        container.writestr("archive/version", "3")
    with pytest.raises(ImportRefused, match="damaged"):
        read_checkpoint(tmp_path / "c.pth")


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    content = _content()
    name = "decoder.encoder.stages.0.0.convs.0.all_modules.0.weight"
    content["network_weights"][name] = content["network_weights"][name] + 1
    with pytest.raises(ImportRefused, match="differs from its copy"):
        read_checkpoint(_save(tmp_path / "c.pth", content))


def _expanded() -> torch.Tensor:
    return torch.zeros(1).expand(10**9)


def _sparse() -> torch.Tensor:
    with warnings.catch_warnings():
        # torch announces that the invariants of sparse tensors are not checked; nothing is computed with this one.
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (3.0, "no dense"),
        (torch.zeros(2, dtype=torch.int64), "no dense"),
        (_expanded(), "larger than what the file holds"),
        (torch.empty(3, device="meta"), "no dense"),
    ],
    ids=["number", "integers", "stride 0", "meta"],
)
def test_what_is_no_dense_float_tensor_is_refused(tmp_path: Path, value: object, named: str) -> None:
    content = _content(network_weights={"encoder.x": value})
    with pytest.raises(ImportRefused, match=named):
        read_checkpoint(_save(tmp_path / "c.pth", content))


def test_sparse_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused):
        read_checkpoint(_save(tmp_path / "c.pth", _content(network_weights={"encoder.x": _sparse()})))


@pytest.mark.parametrize(
    "changes",
    [
        {"network_weights": []},
        {"network_weights": {}},
        {"trainer_name": 5},
        {"init_args": "x"},
        {"inference_allowed_mirroring_axes": (0, 3)},
        {"inference_allowed_mirroring_axes": (0, 0)},
        {"inference_allowed_mirroring_axes": "all"},
    ],
    ids=str,
)
def test_other_layout_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ImportRefused):
        read_checkpoint(_save(tmp_path / "c.pth", _content(**changes)))


def test_missing_unknown_misshapen_and_infinite_parameters_are_named(tmp_path: Path) -> None:
    weights = dict(read_checkpoint(_save(tmp_path / "c.pth", _content())).weights)
    name = "decoder.seg_layers.1.bias"

    def with_weights(changed: dict[str, torch.Tensor]) -> Checkpoint:
        return Checkpoint(weights=changed, trainer="t", configuration=None, fold=None, mirror_axes=())

    with pytest.raises(ImportRefused, match=rf"{name} is missing"):
        _load(with_weights({k: v for k, v in weights.items() if k != name}))
    with pytest.raises(ImportRefused, match="extra is not part of the network"):
        _load(with_weights({**weights, "extra": torch.zeros(1)}))
    with pytest.raises(ImportRefused, match=r"has shape"):
        _load(with_weights(weights), heads=4)
    with pytest.raises(ImportRefused, match="not finite"):
        _load(with_weights({**weights, name: torch.tensor([0.0, np.inf, 0.0])}))


@pytest.mark.peer("shared-data")
def test_checkpoints_that_nnunet_wrote_are_read() -> None:
    files = sorted(shared_root().glob("models/*/*/fold_*/checkpoint_final.pth"))
    assert len(files) == 4
    for file in files:
        checkpoint = read_checkpoint(file)
        plans = read_plans(file.parent.parent / "plans.json")
        heads = checkpoint.weights["decoder.seg_layers.2.bias"].shape[0]
        architecture = plans.configurations[checkpoint.configuration or ""].architecture
        load_network(checkpoint, architecture, channels=1, heads=heads, where=file.parent.name)
