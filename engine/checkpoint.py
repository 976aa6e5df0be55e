"""Reads a checkpoint of nnU-Net v2 without running anything that is in it (torch).

Only tensors, plain Python values and numpy scalars are unpickled (torch's weights-only reader with a closed list).
Everything else, and every tensor that does not fit the plans, is refused.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.architecture import Architecture
from engine.errors import ImportRefused
from engine.json_reader import Reader
from engine.network import PlainConvUNet, ResidualEncoderUNet, build_network

MAX_CHECKPOINT_BYTES = 16 * 2**30
_MAX_ENTRIES = 100_000
_MAX_EPOCHS = 10**9
_PREFIXES = ("module.", "_orig_mod.")
_COPIES = ((".all_modules.0.", ".conv."), (".all_modules.1.", ".norm."))
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([A-Za-z0-9_.]{1,200})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`weights`: name to tensor as stored, copies dropped. `mirror_axes`: spatial axes in network order, () when
    the model was trained without mirroring. `configuration`, `fold` and the number of `epochs` that were trained as
    the trainer noted them, if it did."""

    weights: Mapping[str, Tensor]
    trainer: str
    configuration: str | None
    fold: str | None
    mirror_axes: tuple[int, ...]
    epochs: int | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ImportRefused: no readable torch file, objects other than tensors and plain values (the first one is
    named), a layout other than nnU-Net v2's, copies of one tensor that differ."""
    return load_checkpoint_file(path)[1]


def load_checkpoint_file(path: Path) -> tuple[Mapping[str, Any], Checkpoint]:
    """Everything in the file, and what of it is checked; raises as `read_checkpoint` does."""
    _check_container(path)
    content = _load(path)
    reader = Reader(content, where=path.name, error=ImportRefused)
    weights = reader.raw("network_weights")
    if not isinstance(content, Mapping) or not isinstance(weights, Mapping):
        raise reader.fail("network_weights", "a table of tensors is needed")
    arguments = reader.child("init_args", {})
    fold = arguments.raw("fold", None)
    return content, Checkpoint(
        weights=_without_copies(path.name, weights),
        trainer=reader.text("trainer_name", "unknown"),
        configuration=arguments.text_or_none("configuration"),
        fold=None if fold is None else str(fold)[:16],
        mirror_axes=_mirror_axes(reader),
        epochs=_epochs(reader.raw("current_epoch", None)),
    )


def load_network(
    checkpoint: Checkpoint, architecture: Architecture, *, channels: int, heads: int, where: str
) -> PlainConvUNet | ResidualEncoderUNet:
    """The network in evaluation mode, float32, on the CPU, deep supervision off.

    Names, shapes and values are checked before anything of the size that the plans ask for is allocated. Raises
    ImportRefused with `where` and the first parameter that is missing, unknown, of another shape, or not finite.
    """
    with torch.device("meta"):
        network = build_network(architecture, channels=channels, heads=heads)
    expected = network.state_dict()
    weights: dict[str, Tensor] = {}
    for name in sorted(set(expected) - set(checkpoint.weights)):
        raise ImportRefused(f"{where}: parameter {name} is missing; the plans do not describe this network")
    for name, tensor in checkpoint.weights.items():
        if name not in expected:
            raise ImportRefused(f"{where}: parameter {name[:200]} is not part of the network in the plans")
        if tensor.shape != expected[name].shape:
            raise ImportRefused(
                f"{where}: parameter {name} has shape {tuple(tensor.shape)}, the plans and dataset.json need "
                f"{tuple(expected[name].shape)}"
            )
        values = tensor.detach().to(torch.float32, copy=True).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise ImportRefused(f"{where}: parameter {name} has values that are not finite")
        weights[name] = values
    network.load_state_dict(weights, strict=True, assign=True)
    network.requires_grad_(False)
    network.eval()
    return network


def _check_container(path: Path) -> None:
    """torch's zip container, its entries stored uncompressed: no archive that unpacks to more than it holds."""
    try:
        if not path.is_file():
            raise ImportRefused(f"{path.name}: is not a file")
        size = path.stat().st_size
        if size > MAX_CHECKPOINT_BYTES:
            raise ImportRefused(f"{path.name}: {size} bytes; at most {MAX_CHECKPOINT_BYTES} are read")
        with zipfile.ZipFile(path) as container:
            entries = container.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError) as exc:
        raise ImportRefused(
            f"{path.name}: is no torch file in the zip format that nnU-Net v2 writes (torch.save since 1.6)"
        ) from exc
    except OSError as exc:
        raise ImportRefused(f"{path.name}: cannot be read: {exc.strerror}") from exc
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ImportRefused(f"{path.name}: compressed entries; torch.save writes none")
    if len(entries) > _MAX_ENTRIES or sum(entry.file_size for entry in entries) > size:
        raise ImportRefused(f"{path.name}: the container claims more content than the file holds")


def _load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        named = _REFUSED_GLOBAL.search(str(exc))
        what = f"it asks for {named.group(1)}" if named else "it holds more than tensors and plain values"
        raise ImportRefused(f"{path.name}: refused, nothing of it was run: {what}") from exc
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OSError) as exc:
        # What torch's reader raises on a damaged or forged file is not documented; these were seen or are plausible.
        raise ImportRefused(f"{path.name}: damaged: {str(exc)[:200]}") from exc


def _allowed_globals() -> list[Any]:
    """numpy scalars, which nnU-Net's logging leaves in the file, under the module names of numpy 1 and 2."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
        (_encode_latin1, "_codecs.encode"),
    ]


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, which pickle protocol 2 uses for bytes, with the one encoding it needs."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("_codecs.encode with another encoding than latin1")
    return text.encode("latin1")


def _without_copies(where: str, weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    """nnU-Net registers its tensors several times; one of each is kept, and the copies must be equal."""
    kept: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or len(name) > 1000:
            raise ImportRefused(f"{where}: network_weights: a name is not a text of reasonable length")
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_floating_point():
            raise ImportRefused(f"{where}: parameter {name[:200]} is no dense floating-point tensor")
        if not tensor.is_contiguous() or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # A stride of 0 lets a few bytes pose as a tensor of any size; torch.save writes weights densely.
            raise ImportRefused(f"{where}: parameter {name[:200]} is larger than what the file holds")
        canonical = _canonical(name)
        if canonical not in kept:
            kept[canonical] = tensor
        elif kept[canonical].shape != tensor.shape or not torch.equal(kept[canonical], tensor):
            raise ImportRefused(f"{where}: parameter {name[:200]} differs from its copy {canonical[:200]}")
    if not kept:
        raise ImportRefused(f"{where}: network_weights is empty")
    return kept


def _canonical(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    if name.startswith("decoder.encoder."):
        name = name[len("decoder.") :]
    for copy, original in _COPIES:
        name = name.replace(copy, original)
    return name


def _epochs(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_EPOCHS else None


def _mirror_axes(reader: Reader) -> tuple[int, ...]:
    if reader.raw("inference_allowed_mirroring_axes", None) is None:
        return ()
    axes = reader.integers("inference_allowed_mirroring_axes", 0, 2, lengths=(0, 3))
    if len(set(axes)) != len(axes):
        raise reader.fail("inference_allowed_mirroring_axes", "an axis is named twice")
    return tuple(sorted(axes))
