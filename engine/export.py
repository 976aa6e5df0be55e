"""From a trained model to a bundle: each network becomes an ONNX file that is proven to compute the same (torch)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.backend_figures import BackendFigure, BackendFigures, this_machine
from engine.bundle import Bundle, write_bundle
from engine.calibration_file import calibration_document
from engine.checkpoint import load_network, read_checkpoint
from engine.errors import ImportRefused, MemoryExceeded
from engine.evidence import Evidence, write_evidence
from engine.intensity_baseline import IntensityBaseline
from engine.manifest import BundleConfiguration, Ensemble, Fold, Manifest, Parity, Weights, check_identity, check_semver
from engine.memory import available_bytes
from engine.model_card import ModelCard, describe_model, read_channels
from engine.onnx_graph import write_onnx
from engine.parity import MeasuredNetwork, check_parity
from engine.plans import Configuration
from engine.predictor import Predictor
from engine.provenance import (
    FoldTraining,
    Provenance,
    Validation,
    data_origin,
    describe_fold,
    public_dataset_json,
    public_fingerprint_json,
    this_software,
)
from engine.quality_estimate import Calibration
from engine.result_folder import ResultConfiguration, ResultFold, ResultFolder, open_result
from engine.sanity_check import check_sanity
from engine.sanity_making import SiteCase, make_sanity, read_site_folder, refuse_disagreement
from engine.validation import TorchBackend

Progress = Callable[[float, str], None]
Notice = Callable[[str], None]

# Shares of the progress: networks written and compared, then sanity cases by torch, then by ONNX Runtime.
_NETWORKS, _TORCH = 0.3, 0.65


def import_model(
    path: Path,
    out_dir: Path,
    *,
    name: str | None = None,
    semver: str | None = None,
    card: ModelCard | None = None,
    configurations: Collection[str] | None = None,
    folds: Collection[str] | None = None,
    checkpoint: str | None = None,
    ensemble: Ensemble = "probabilities",
    weights: Weights = "float32",
    baseline: IntensityBaseline | None = None,
    phantoms: bool = True,
    site_cases: Sequence[SiteCase] = (),
    site_folder: Path | None = None,
    calibrate: Callable[[Bundle], tuple[Calibration, str]] | None = None,
    validation: Validation | None = None,
    excluded: Collection[str] | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Bundle:
    """Import what `path` holds (engine/result_folder.py) and write the bundle `out_dir`, which must not exist.

    `checkpoint` is the file's name in each fold, where it is not the usual one.
    `name` and `semver` go before the card's; without either the dataset's name and 1.0.0 are taken. `phantoms`,
    `site_cases` and those in `site_folder` become the sanity cases: ONNX Runtime must give torch's labels on each.
    `calibrate` gets the bundle before it is in its place, and gives its calibration and a text for its description.
    `validation` and the cases that the dataset left out (`excluded`, None where unknown) go into the provenance.
    `progress` gets the share that is done and a text; `notice` gets what was chosen and what a person should look at.
    The same input gives the same bytes but for the times in backends.json. `out_dir` appears complete or not at all.

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
    if weights == "fp16" and not (phantoms or site_cases or site_folder):
        raise ImportRefused("weights in fp16 are proven on the sanity cases; there are none")
    with open_result(path, configurations=configurations, folds=folds, checkpoint=checkpoint) as result:
        chosen_name = name or card.name or _name_from_dataset(result.plans.dataset_name)
        check_identity(chosen_name, chosen_semver, error=ImportRefused)
        description = describe_model(result.plans, result.dataset_json, result.label_manager, card)
        for text in (*result.notes, *description.warnings):
            tell(text)
        licence = card.licence or _licence(result)
        if not licence:
            tell("no licence is known for this model. Give `licence` in a card.")
        given = list(site_cases)
        if site_folder is not None:
            given += read_site_folder(site_folder, channels=len(description.channels))
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
        try:
            exported = _export_all(result, staging, weights, report, tell)
            manifest = Manifest(
                name=chosen_name,
                semver=chosen_semver,
                description=card.description or f"{result.plans.dataset_name}, {result.plans.plans_name}",
                licence=licence,
                origin=card.origin or _origin(result),
                channels=description.channels,
                labels=description.labels,
                contract=description.contract,
                configurations=exported.configurations,
                ensemble=ensemble,
                step_size=card.step_size,
                parity=exported.parity,
                quality=description.quality,
                weights=weights,
            )
            staging.chmod(0o755)
            evidence = Evidence(
                baseline=baseline,
                provenance=_provenance(result, card, exported.training, validation, excluded),
                backends=BackendFigures(machine=this_machine(), figures=exported.figures),
            )
            bundle = _write(staging, manifest, result, evidence)
            if phantoms or given:
                sanity = make_sanity(
                    bundle,
                    exported.networks,
                    phantoms=phantoms,
                    site_cases=given,
                    progress=lambda share, text: report(_NETWORKS + (_TORCH - _NETWORKS) * share, text),
                )
                exported.networks.clear()
                evidence = replace(evidence, sanity=sanity)
                bundle = _write(staging, manifest, result, evidence)
                _prove(bundle, lambda share: report(_TORCH + (1 - _TORCH) * share, "sanity cases, ONNX Runtime"), tell)
            if calibrate is not None:
                calibration, text = calibrate(bundle)
                if calibration.labels:
                    manifest = replace(manifest, description=f"{manifest.description} {text}".strip())
                    bundle = _write(staging, manifest, result, evidence, calibration)
            report(1.0, "done")
            return _publish(bundle, staging, out_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _prove(bundle: Bundle, progress: Callable[[float], None], tell: Notice) -> None:
    """The bundle's own files give torch's labels on its sanity cases; raises ParityFailed with the figures."""
    cases = bundle.evidence.sanity.cases if bundle.evidence.sanity is not None else ()
    if not any(any(case.voxels.values()) for case in cases):
        tell("the model finds nothing in its sanity cases, so they prove little; give cases of your own")
    with Predictor(bundle, device="cpu") as predictor:
        found = check_sanity(predictor, progress=progress)
    refuse_disagreement(found, f"the networks in ONNX Runtime, weights in {bundle.weights},")


@dataclass(frozen=True, kw_only=True)
class _Exported:
    """What came of the networks. `networks` are torch's, as they were trained, by configuration and fold."""

    configurations: tuple[BundleConfiguration, ...]
    parity: tuple[Parity, ...]
    figures: tuple[BackendFigure, ...]
    training: tuple[tuple[FoldTraining, frozenset[str]], ...]
    networks: dict[tuple[str, str], TorchBackend]


def _export_all(result: ResultFolder, staging: Path, weights: Weights, report: Progress, tell: Notice) -> _Exported:
    total = sum(len(configuration.folds) for configuration in result.configurations)
    configurations: list[BundleConfiguration] = []
    done: list[_ExportedFold] = []
    for source in result.configurations:
        planned = result.plans.configurations[source.name]
        folds: list[Fold] = []
        axes: list[tuple[int, ...]] = []
        for fold in source.folds:
            report(_NETWORKS * len(done) / total, f"{source.name}, fold {fold.fold}")
            exported = _export_fold(result, source, fold, planned, staging, weights)
            for note in exported.measured.notes:
                tell(note)
            axes.append(exported.mirror_axes)
            folds.append(Fold(fold=fold.fold, file=exported.file))
            done.append(exported)
        common = tuple(axis for axis in axes[0] if all(axis in own for own in axes))
        if any(own != common for own in axes):
            tell(f"{source.name}: its folds have different mirror axes; those that all have are used: {list(common)}")
        configurations.append(
            BundleConfiguration(
                name=source.name, folds=tuple(folds), mirror_axes=common, previous_stage=planned.previous_stage
            )
        )
    return _Exported(
        configurations=tuple(configurations),
        parity=tuple(exported.measured.parity for exported in done),
        figures=tuple(figure for exported in done for figure in exported.measured.figures),
        training=tuple((exported.training, exported.cases) for exported in done),
        networks={(exported.training.configuration, exported.training.fold): exported.network for exported in done},
    )


@dataclass(frozen=True, kw_only=True)
class _ExportedFold:
    file: Path
    mirror_axes: tuple[int, ...]
    measured: MeasuredNetwork
    training: FoldTraining
    cases: frozenset[str]
    network: TorchBackend


def _export_fold(
    result: ResultFolder,
    source: ResultConfiguration,
    fold: ResultFold,
    planned: Configuration,
    staging: Path,
    weights: Weights,
) -> _ExportedFold:
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
    parameters: dict[str, NDArray[np.float32]] = {name: value.numpy() for name, value in network.state_dict().items()}
    for written in write_onnx(
        file,
        planned.architecture,
        parameters,
        channels=channels,
        heads=labels.num_heads,
        patch_size=planned.patch_size,
        half=weights == "fp16",
    ):
        written.chmod(0o644)
    training, cases = describe_fold(
        fold.checkpoint.parent,
        configuration=source.name,
        fold=fold.fold,
        trainer=checkpoint.trainer,
        checkpoint=fold.kind,
        epochs=checkpoint.epochs,
        error=ImportRefused,
    )
    return _ExportedFold(
        file=file,
        mirror_axes=checkpoint.mirror_axes,
        measured=check_parity(
            network, file, planned, channels=channels, label_manager=labels, fold=fold.fold, weights=weights
        ),
        training=training,
        cases=cases,
        network=TorchBackend(network),
    )


def _provenance(
    result: ResultFolder,
    card: ModelCard,
    training: Sequence[tuple[FoldTraining, frozenset[str]]],
    validation: Validation | None,
    excluded: Collection[str] | None,
) -> Provenance:
    names = frozenset[str]().union(*(cases for _, cases in training))
    return Provenance(
        data=data_origin(
            result.dataset_json, card.data, names, dataset_name=result.plans.dataset_name, excluded=excluded
        ),
        training=tuple(fold for fold, _ in training),
        exported_by=this_software(),
        validation=validation,
    )


def _write(
    staging: Path,
    manifest: Manifest,
    result: ResultFolder,
    evidence: Evidence,
    calibration: Calibration | None = None,
) -> Bundle:
    """Everything but the networks and the sanity cases' arrays, without the names of cases."""
    write_evidence(staging, evidence)
    return write_bundle(
        staging,
        manifest,
        plans_json=result.plans_json,
        dataset_json=public_dataset_json(result.dataset_json),
        postprocessing=result.postprocessing,
        fingerprint_json=public_fingerprint_json(result.fingerprint_json),
        calibration_json=None if calibration is None else calibration_document(calibration),
    )


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
