"""The model bundle: the directory that holds everything a model needs to run (docs/model-bundle.md).

`load_bundle` believes nothing: every file is listed with its SHA-256 and checked, no path leaves the directory, no
file is there that is not listed, and every value has its type and range.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.calibration_file import CALIBRATION_JSON, read_calibration
from engine.errors import BundleInvalid, ImportRefused
from engine.evidence import Evidence, is_outside_configuration, read_evidence
from engine.json_reader import Reader, read_json
from engine.labels import LabelManager
from engine.manifest import (
    MANIFEST,
    MAX_FILES,
    SCHEMA_VERSION,
    BundleConfiguration,
    Manifest,
    check_pairs,
    manifest_document,
    read_manifest,
    safe_path,
)
from engine.plans import Plans, read_plans
from engine.quality_estimate import Calibration

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """A loaded bundle. `weights_digest` identifies the networks, `configuration_digest` everything else that
    changes a result, `evidence_digest` the rest: sanity cases, provenance, figures of backends (docs/model-bundle.md).
    `calibration` is None where no quality is estimated."""

    root: Path
    plans: Plans
    dataset_json: Mapping[str, Any]
    label_manager: LabelManager
    postprocessing: Mapping[str, Any] | None
    weights_digest: str
    configuration_digest: str
    evidence: Evidence = field(default_factory=Evidence)
    evidence_digest: str = ""
    calibration: Calibration | None = None

    def configuration(self, name: str) -> BundleConfiguration:
        """Raises BundleInvalid when the bundle has no configuration of that name."""
        for configuration in self.configurations:
            if configuration.name == name:
                return configuration
        raise BundleInvalid(f"{self.name}: no configuration {name!r}")

    @property
    def final_configurations(self) -> tuple[BundleConfiguration, ...]:
        """Those whose outputs are joined into the result: all but the earlier stages of a cascade."""
        earlier = {c.previous_stage for c in self.configurations}
        return tuple(c for c in self.configurations if c.name not in earlier)


def load_bundle(root: Path, *, verify: bool = True) -> Bundle:
    """The bundle in `root`. `verify=False` skips the hashing of file contents, nothing else.

    Raises BundleInvalid with file and key: unreadable, unknown schema version, a file missing, changed, not listed,
    a link, or outside the directory; a value of wrong type or range; names that do not fit together.
    """
    root = root.resolve()
    document = read_json(root / MANIFEST, error=BundleInvalid)
    reader = Reader(document, where=MANIFEST, error=BundleInvalid)
    version = reader.raw("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise reader.fail("schema_version", f"{str(version)[:20]} is unknown; this release reads {SCHEMA_VERSION}")
    files = _listed_files(reader)
    _check_files(root, files, verify=verify)
    manifest = read_manifest(reader, root)
    for needed in ("plans.json", "dataset.json"):
        if needed not in files:
            raise reader.fail("files", f"{needed} is not listed")
    for configuration in manifest.configurations:
        for fold in configuration.folds:
            if fold.file.relative_to(root).as_posix() not in files:
                raise reader.fail("files", f"{fold.file.relative_to(root).as_posix()} is not listed")
    names = [configuration.name for configuration in manifest.configurations]
    try:
        plans = read_plans(root / "plans.json", configurations=names)
        dataset_json = read_json(root / "dataset.json", error=BundleInvalid)
        label_manager = LabelManager.from_dataset_json(dataset_json)
    except ImportRefused as exc:
        raise BundleInvalid(str(exc)) from exc
    _check_consistency(reader, manifest, plans, dataset_json, label_manager)
    postprocessing = None
    if "postprocessing.json" in files:
        postprocessing = read_json(root / "postprocessing.json", error=BundleInvalid)
    return Bundle(
        **vars(manifest),
        root=root,
        plans=plans,
        dataset_json=MappingProxyType(dataset_json),
        label_manager=label_manager,
        postprocessing=None if postprocessing is None else MappingProxyType(postprocessing),
        weights_digest=_digest({path: sha for path, sha in files.items() if _is_weights(path)}),
        configuration_digest=_configuration_digest(document, files),
        evidence=read_evidence(root, files, manifest),
        evidence_digest=_digest({path: sha for path, sha in files.items() if is_outside_configuration(path)}),
        calibration=_calibration(root, files, manifest),
    )


def write_bundle(
    root: Path,
    manifest: Manifest,
    *,
    plans_json: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    postprocessing: Mapping[str, Any] | None = None,
    fingerprint_json: Mapping[str, Any] | None = None,
    calibration_json: Mapping[str, Any] | None = None,
) -> Bundle:
    """Complete a directory in which the ONNX files already lie: writes the JSON files and bundle.json last, flushes
    every file and folder to disk, and returns the bundle as `load_bundle` reads it back.

    Every file below `root` becomes part of the bundle. Same content gives the same bytes. Raises BundleInvalid.
    """
    root = root.resolve()
    documents = {
        "plans.json": plans_json,
        "dataset.json": dataset_json,
        "postprocessing.json": postprocessing,
        "fingerprint.json": fingerprint_json,
        CALIBRATION_JSON: calibration_json,
    }
    for name, content in documents.items():
        if content is not None:
            (root / name).write_text(_pretty(content), encoding="utf-8")
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = {name: _sha256(root / name) for name in found if name != MANIFEST}
    (root / MANIFEST).write_text(_pretty({**manifest_document(manifest, root), "files": files}), encoding="utf-8")
    for path in sorted([root, *root.rglob("*")], reverse=True):
        _flush(path)
    return load_bundle(root)


def _pretty(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _calibration(root: Path, files: Mapping[str, str], manifest: Manifest) -> Calibration | None:
    if CALIBRATION_JSON not in files:
        return None
    document = read_json(root / CALIBRATION_JSON, error=BundleInvalid)
    return read_calibration(document, [label.name for label in manifest.labels])


def _listed_files(reader: Reader) -> dict[str, str]:
    listed = reader.child("files")
    files: dict[str, str] = {}
    for name in listed.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
        if len(files) >= MAX_FILES:
            raise reader.fail("files", f"more than {MAX_FILES}")
        safe_path(listed, name)
        sha = listed.text(name)
        if not _SHA256.fullmatch(sha):
            raise listed.fail(name, "is no SHA-256 in lower case hexadecimal")
        files[name] = sha
    return files


def _check_files(root: Path, files: Mapping[str, str], *, verify: bool) -> None:
    present: set[str] = set()
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            raise BundleInvalid(f"{name}: links are not allowed in a bundle")
        if path.is_dir():
            continue
        if not path.is_file():
            raise BundleInvalid(f"{name}: is not a regular file")
        present.add(name)
    for name in sorted(set(files) - present):
        raise BundleInvalid(f"{name}: listed in {MANIFEST} but missing")
    for name in sorted(present - set(files) - {MANIFEST}):
        raise BundleInvalid(f"{name}: not listed in {MANIFEST}; remove it or import the model again")
    if verify:
        for name, expected in files.items():
            found = _sha256(root / name)
            if found != expected:
                raise BundleInvalid(f"{name}: SHA-256 is {found}, {MANIFEST} says {expected}: the file was changed")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise BundleInvalid(f"{path.name}: cannot be read: {exc.strerror}") from exc


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_weights(path: str) -> bool:
    return path.endswith((".onnx", ".onnx.data"))


def _digest(files: Mapping[str, str]) -> str:
    lines = sorted(f"{sha}  {path}\n" for path, sha in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _configuration_digest(document: Mapping[str, Any], files: Mapping[str, str]) -> str:
    kept = {key: value for key, value in document.items() if key not in {"files", "parity", "description"}}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    others = {path: sha for path, sha in files.items() if not _is_weights(path) and not is_outside_configuration(path)}
    return _digest({**others, MANIFEST: hashlib.sha256(canonical.encode()).hexdigest()})


def _check_consistency(
    reader: Reader, manifest: Manifest, plans: Plans, dataset_json: Mapping[str, Any], labels: LabelManager
) -> None:
    names = [configuration.name for configuration in manifest.configurations]
    if len(set(names)) != len(names):
        raise reader.fail("configurations", "a name appears twice")
    channel_names = dataset_json.get("channel_names", dataset_json.get("modality"))
    if not isinstance(channel_names, dict) or len(channel_names) != len(manifest.channels):
        raise reader.fail("channels", "do not fit dataset.json: channel_names")
    if [channel.index for channel in manifest.channels] != list(range(len(manifest.channels))):
        raise reader.fail("channels", "indices must be 0, 1, 2, ...")
    for configuration in manifest.configurations:
        planned = plans.configurations[configuration.name]
        place = f"configurations: {configuration.name}"
        if configuration.previous_stage != planned.previous_stage:
            raise reader.fail(place, f"previous_stage is {planned.previous_stage!r} in plans.json")
        if planned.previous_stage is not None and planned.previous_stage not in names:
            raise reader.fail(place, f"its previous stage {planned.previous_stage!r} is not in the bundle")
        seen, stage = {configuration.name}, planned.previous_stage
        while stage is not None and stage in names:
            if stage in seen:
                raise reader.fail(place, "the previous stages go in a circle")
            seen.add(stage)
            stage = plans.configurations[stage].previous_stage
        if any(axis >= len(planned.patch_size) for axis in configuration.mirror_axes):
            raise reader.fail(place, "mirror_axes names an axis that the network does not have")
        if len(planned.normalization_schemes) != len(manifest.channels):
            raise reader.fail(place, "plans.json normalises another number of channels")
    declared = [(label.name, label.value, label.region) for label in labels.foreground]
    if [(label.name, label.value, label.region) for label in manifest.labels] != declared:
        raise reader.fail("labels", "name, value and region do not fit dataset.json")
    check_pairs(manifest.labels, where=MANIFEST, error=BundleInvalid)
    label_names = {label.name for label in manifest.labels}
    for name in manifest.quality.max_components:
        if name not in label_names:
            raise reader.fail("quality: max_components", f"{name[:80]!r} is no label")
