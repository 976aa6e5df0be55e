"""From a trained model to a bundle: each network becomes an ONNX file that is proven to compute the same (torch)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends import OnnxBackend
from engine.bundle import Bundle, write_bundle
from engine.checkpoint import load_network, read_checkpoint
from engine.errors import ImportRefused, MemoryExceeded, ParityFailed
from engine.labels import LabelManager
from engine.manifest import BundleConfiguration, Ensemble, Fold, Manifest, Parity, check_identity, check_semver
from engine.memory import available_bytes
from engine.model_card import ModelCard, describe_model, read_channels
from engine.network import UNet
from engine.onnx_graph import write_onnx
from engine.plans import Configuration
from engine.result_folder import ResultConfiguration, ResultFold, ResultFolder, open_result

Progress = Callable[[float, str], None]
Notice = Callable[[str], None]

# Two float32 implementations add in different orders; the error grows with the size of the logits (measured about
# 1e-5 of the largest on trained networks).
MAX_ABS_DIFFERENCE = 1e-3
MAX_RELATIVE_DIFFERENCE = 1e-4
MIN_ARGMAX_AGREEMENT = 0.9999
_PARITY_SEED = 20_230_817


def import_model(
    path: Path,
    out_dir: Path,
    *,
    name: str | None = None,
    semver: str | None = None,
    card: ModelCard | None = None,
    configurations: Collection[str] | None = None,
    folds: Collection[str] | None = None,
    ensemble: Ensemble = "probabilities",
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Bundle:
    """Import what `path` holds (engine/result_folder.py) and write the bundle `out_dir`, which must not exist.

    `name` and `semver` go before the card's; without either the dataset's name and 1.0.0 are taken. `progress` gets the
    share that is done and a text; `notice` gets what was chosen and what a person should look at. The same input
    gives the same bytes. `out_dir` appears complete or not at all.

    Raises ImportRefused (unsafe, unknown or inconsistent input), ParityFailed, MemoryExceeded, BundleInvalid.
    """
    card = card or ModelCard()
    tell = notice or (lambda _text: None)
    report = progress or (lambda _share, _text: None)
    out_dir = out_dir.absolute()
    if out_dir.exists():
        raise ImportRefused(f"{out_dir.name}: exists already; give another version or remove it")
    chosen_semver = semver or card.semver or "1.0.0"
    check_semver(chosen_semver, error=ImportRefused)  # before the long work
    with open_result(path, configurations=configurations, folds=folds) as result:
        chosen_name = name or card.name or _name_from_dataset(result.plans.dataset_name)
        check_identity(chosen_name, chosen_semver, error=ImportRefused)
        description = describe_model(result.plans, result.dataset_json, result.label_manager, card)
        for text in (*result.notes, *description.warnings):
            tell(text)
        licence = card.licence or _licence(result)
        if not licence:
            tell("no licence is known for this model. Give `licence` in a card.")
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
        try:
            exported, parity = _export_all(result, staging, report, tell)
            manifest = Manifest(
                name=chosen_name,
                semver=chosen_semver,
                description=card.description or f"{result.plans.dataset_name}, {result.plans.plans_name}",
                licence=licence,
                origin=card.origin or _origin(result),
                channels=description.channels,
                labels=description.labels,
                contract=description.contract,
                configurations=exported,
                ensemble=ensemble,
                step_size=card.step_size,
                parity=parity,
                quality=description.quality,
            )
            staging.chmod(0o755)
            bundle = write_bundle(
                staging,
                manifest,
                plans_json=result.plans_json,
                dataset_json=result.dataset_json,
                postprocessing=result.postprocessing,
                fingerprint_json=result.fingerprint_json,
            )
            report(1.0, "done")
            return _publish(bundle, staging, out_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_parity(
    network: UNet,
    onnx_file: Path,
    configuration: Configuration,
    *,
    channels: int,
    label_manager: LabelManager,
    fold: str,
) -> Parity:
    """Compare torch and ONNX Runtime on seeded noise and on a smooth structured image of the patch's size.

    Raises ParityFailed when the largest difference exceeds both limits of this module, or when fewer than
    MIN_ARGMAX_AGREEMENT of the voxels get the same label.
    """
    where = f"{configuration.name} fold {fold}"
    largest, magnitude, equal, voxels = 0.0, 0.0, 0, 0
    backend = OnnxBackend(onnx_file, channels=channels, patch_size=configuration.patch_size, device="cpu")
    try:
        for image_CZYX in _parity_images(channels, configuration.patch_size):
            with torch.inference_mode():
                expected = network(torch.from_numpy(image_CZYX[None])).numpy()[0]
            found = backend.run(image_CZYX[None])[0]
            if found.shape != expected.shape or not np.isfinite(found).all() or not np.isfinite(expected).all():
                raise ParityFailed(f"{where}: the exported network gives another shape or values that are not finite")
            largest = max(largest, float(np.abs(found - expected).max()))
            magnitude = max(magnitude, float(np.abs(expected).max()))
            same = label_manager.logits_to_labels(found) == label_manager.logits_to_labels(expected)
            equal, voxels = equal + int(same.sum()), voxels + same.size
    finally:
        backend.close()
    agreement = equal / voxels
    limit = max(MAX_ABS_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * magnitude)
    if largest > limit or agreement < MIN_ARGMAX_AGREEMENT:
        raise ParityFailed(
            f"{where}: ONNX Runtime differs from torch by {largest:.2e} (limit {limit:.2e}); {agreement:.6f} of the "
            f"voxels get the same label (limit {MIN_ARGMAX_AGREEMENT})"
        )
    return Parity(configuration=configuration.name, fold=fold, max_abs_difference=largest, argmax_agreement=agreement)


def _export_all(
    result: ResultFolder, staging: Path, report: Progress, tell: Notice
) -> tuple[tuple[BundleConfiguration, ...], tuple[Parity, ...]]:
    total = sum(len(configuration.folds) for configuration in result.configurations)
    done = 0
    exported: list[BundleConfiguration] = []
    parity: list[Parity] = []
    for source in result.configurations:
        planned = result.plans.configurations[source.name]
        folds: list[Fold] = []
        axes: list[tuple[int, ...]] = []
        for fold in source.folds:
            report(done / total, f"{source.name}, fold {fold.fold}")
            file, own_axes, measured = _export_fold(result, source, fold, planned, staging)
            axes.append(own_axes)
            folds.append(Fold(fold=fold.fold, file=file))
            parity.append(measured)
            done += 1
        common = tuple(axis for axis in axes[0] if all(axis in own for own in axes))
        if any(own != common for own in axes):
            tell(f"{source.name}: its folds have different mirror axes; those that all have are used: {list(common)}")
        exported.append(
            BundleConfiguration(
                name=source.name, folds=tuple(folds), mirror_axes=common, previous_stage=planned.previous_stage
            )
        )
    return tuple(exported), tuple(parity)


def _export_fold(
    result: ResultFolder, source: ResultConfiguration, fold: ResultFold, planned: Configuration, staging: Path
) -> tuple[Path, tuple[int, ...], Parity]:
    where = f"{source.name} fold {fold.fold}"
    labels = result.label_manager
    channels = len(read_channels(result.dataset_json))
    if len(planned.normalization_schemes) != channels:
        raise ImportRefused(
            f"{source.name}: the plans normalise {len(planned.normalization_schemes)} channels, "
            f"dataset.json has {channels}"
        )
    if planned.previous_stage is not None:
        # A cascade also sees the earlier stage's label map, one channel per foreground label.
        channels += len(labels.foreground_labels)
    checkpoint = read_checkpoint(fold.checkpoint)
    if checkpoint.configuration not in (None, source.name):
        raise ImportRefused(f"{where}: the checkpoint was trained as {checkpoint.configuration!r}")
    if any(axis >= len(planned.patch_size) for axis in checkpoint.mirror_axes):
        raise ImportRefused(f"{where}: the checkpoint mirrors axis {max(checkpoint.mirror_axes)}, which does not exist")
    network = load_network(checkpoint, planned.architecture, channels=channels, heads=labels.num_heads, where=where)
    _check_memory(planned, channels=channels, heads=labels.num_heads, where=where)
    # Names of configurations are the user's; the folder's name is made of safe characters.
    folder = staging / re.sub(r"[^A-Za-z0-9_]", "_", source.name)[:64]
    folder.mkdir(exist_ok=True)
    file = folder / f"fold_{fold.fold}.onnx"
    if file.exists():
        raise ImportRefused(f"{where}: two configurations have names too much alike")
    weights: dict[str, NDArray[np.float32]] = {name: value.numpy() for name, value in network.state_dict().items()}
    for written in write_onnx(
        file,
        planned.architecture,
        weights,
        channels=channels,
        heads=labels.num_heads,
        patch_size=planned.patch_size,
    ):
        written.chmod(0o644)
    measured = check_parity(network, file, planned, channels=channels, label_manager=labels, fold=fold.fold)
    return file, checkpoint.mirror_axes, measured


def _parity_images(channels: int, patch_size: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Noise, and smooth waves with one bright box: both have about the mean 0 and deviation 1 of normalised images."""
    random = np.random.default_rng(_PARITY_SEED)
    noise = random.standard_normal((channels, *patch_size), dtype=np.float32)
    grids = np.meshgrid(*(np.linspace(0.0, 1.0, edge) for edge in patch_size), indexing="ij")
    structured = np.zeros((channels, *patch_size), dtype=np.float32)
    for channel in range(channels):
        for grid in grids:
            structured[channel] += np.sin(2 * np.pi * (random.uniform(0.5, 3.0) * grid + random.uniform()))
    structured[:, *(slice(edge // 3, 2 * edge // 3 + 1) for edge in patch_size)] += 2.0
    return [noise, structured]


def _check_memory(planned: Configuration, *, channels: int, heads: int, where: str) -> None:
    """One forward at full resolution holds about six feature maps of the first stage; more does not fit, no proof."""
    voxels = int(np.prod(planned.patch_size, dtype=np.int64))
    needed = 4 * voxels * (6 * planned.architecture.features_per_stage[0] + channels + 3 * heads)
    free = available_bytes()
    if needed > free:
        raise MemoryExceeded(
            f"{where}: checking the exported network needs about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free"
        )


def _publish(bundle: Bundle, staging: Path, out_dir: Path) -> Bundle:
    """Rename the finished directory and make the new name durable."""
    try:
        staging.rename(out_dir)
    except OSError as exc:
        raise ImportRefused(f"{out_dir.name}: cannot be put in place: {exc.strerror}") from exc
    with contextlib.ExitStack() as stack:
        handle = os.open(out_dir.parent, os.O_RDONLY)
        stack.callback(os.close, handle)
        os.fsync(handle)
    return _moved(bundle, out_dir)


def _moved(bundle: Bundle, root: Path) -> Bundle:
    """The same bundle under its final path; its content was verified when it was written."""
    values = dict(vars(bundle))
    old: Path = values["root"]
    values["root"] = root.resolve()
    values["configurations"] = tuple(
        BundleConfiguration(
            name=configuration.name,
            folds=tuple(
                Fold(fold=fold.fold, file=values["root"] / fold.file.relative_to(old)) for fold in configuration.folds
            ),
            mirror_axes=configuration.mirror_axes,
            previous_stage=configuration.previous_stage,
        )
        for configuration in bundle.configurations
    )
    return Bundle(**values)


def _name_from_dataset(dataset_name: str) -> str:
    plain = re.sub(r"^Dataset\d+_", "", dataset_name)
    return re.sub(r"[^a-z0-9]+", "-", plain.casefold()).strip("-")[:63] or "model"


def _licence(result: ResultFolder) -> str:
    for key in ("licence", "license"):
        value = result.dataset_json.get(key)
        if isinstance(value, str) and 0 < len(value) <= 1000:
            return value
    return ""


def _origin(result: ResultFolder) -> str:
    parts = [
        f"{configuration.name} ({configuration.trainer}, "
        + ", ".join(f"fold {fold.fold}: {fold.kind}" for fold in configuration.folds)
        + ")"
        for configuration in result.configurations
    ]
    return f"nnU-Net v2, {result.plans.dataset_name}, {result.plans.plans_name}: {'; '.join(parts)}"
