"""Models that are no bundle yet → bundles, made once and kept under the digest of what they were made from.

The cache is a folder of bundles; each may be removed at any time. A bundle there is verified each time it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.bundle import Bundle, load_bundle
from engine.errors import BundleInvalid, ImportRefused
from engine.lock_file import try_lock
from engine.model_archive import bundle_folder, unpack_model
from engine.model_card import ModelCard, orientation_is_stated
from engine.result_folder import ResultFolder, open_result
from engine.volume import AS_STORED

Tell = Callable[[str], None]
Progress = Callable[[float, str], None]

_KIND = "2"
"""Changes when a conversion of the same files gives another bundle."""
_WAIT_FOR_ANOTHER = 36_000  # times 0.1 s: as long as the longest conversion takes


def cache_folder(chosen: Path | None) -> Path:
    """`chosen`, else seggate/bundles in XDG_CACHE_HOME or ~/.cache."""
    if chosen is not None:
        return chosen
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "seggate" / "bundles"


def unpacked_bundle(archive: Path, cache: Path) -> Bundle:
    """The bundle in a zip. Raises ImportRefused for an unsafe archive, BundleInvalid."""
    target = cache / _digest({"archive": _file_digest(archive)})

    def make(staging: Path) -> None:
        unpack_model(archive, staging / "archive", everything=True)
        (staging / "archive" / (bundle_folder(archive) or "")).rename(staging / "bundle")

    return _kept(target, make, lambda: None)


def converted_result(
    path: Path,
    cache: Path,
    *,
    configurations: Sequence[str] | None,
    folds: Sequence[str] | None,
    checkpoint: str | None,
    tell: Tell,
    detail: Tell,
    progress: Progress,
) -> Bundle:
    """The bundle of a model that nnU-Net (or `seggate train`) trained: a result folder, a folder of several, their zip,
    or a checkpoint. Voxels are taken as stored, unless its reader turns them.

    `tell` hears of a conversion, `detail` what it finds worth saying. Needs torch where it was not converted before.
    Raises ImportRefused, ParityFailed, BundleInvalid, MemoryExceeded.
    """
    selection = {"configurations": configurations, "folds": folds, "checkpoint": checkpoint}
    if path.is_file():
        made_from: Mapping[str, Any] = {**selection, "file": _file_digest(path), "beside": _beside(path)}
    else:
        with open_result(path, configurations=configurations, folds=folds, checkpoint=checkpoint) as result:
            made_from = _content(result)

    def make(staging: Path) -> None:
        with open_result(path, configurations=configurations, folds=folds, checkpoint=checkpoint) as result:
            stated = orientation_is_stated(result.plans, None)
        _import_model()(
            path,
            staging / "bundle",
            card=ModelCard() if stated else ModelCard(contract={"orientation": AS_STORED}),
            configurations=configurations,
            folds=folds,
            checkpoint=checkpoint,
            phantoms=False,
            progress=progress,
            notice=detail,
        )

    def announce() -> None:
        tell(f"{path.name}: is converted to a bundle, once")

    return _kept(cache / _digest(made_from), make, announce)


def _import_model() -> Callable[..., Bundle]:
    """Raises ImportRefused, with what to do, where a package that it needs is missing."""
    try:
        from engine.export import import_model
    except ModuleNotFoundError as error:
        if error.name in {"torch", "onnx"}:
            raise ImportRefused(
                f"a model of nnU-Net is converted once, which needs the Python package {error.name}: install seggate "
                "with the extra `train` (make install EXTRAS=train), or convert it elsewhere with `seggate models "
                "import` and give the bundle to -m"
            ) from error
        raise
    return import_model


def _kept(target: Path, make: Callable[[Path], None], announce: Callable[[], None]) -> Bundle:
    """The bundle at `target`, made there if it is absent or damaged; of several processes one makes it. `make` gets an
    empty folder and leaves the bundle in its subfolder `bundle`."""
    found = _load(target)
    if found is not None:
        return found
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("a+") as lock:
        if not try_lock(lock, attempts=_WAIT_FOR_ANOTHER):
            raise ImportRefused(f"{target.name}: another process has been converting it for an hour; stop that one")
        found = _load(target)
        if found is None:
            announce()
            shutil.rmtree(target, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as staging:
                (Path(staging) / "archive").mkdir()
                make(Path(staging))
                (Path(staging) / "bundle").rename(target)
            found = load_bundle(target)
        return found


def _load(folder: Path) -> Bundle | None:
    if not folder.is_dir():
        return None
    try:
        return load_bundle(folder)
    except BundleInvalid:
        return None


def _content(result: ResultFolder) -> Mapping[str, Any]:
    """Everything that the bundle is made from."""
    return {
        "plans": result.plans_json,
        "dataset": result.dataset_json,
        "fingerprint": result.fingerprint_json,
        "postprocessing": result.postprocessing,
        "configurations": [
            {
                "name": configuration.name,
                "trainer": configuration.trainer,
                "folds": {fold.fold: [fold.kind, _file_digest(fold.checkpoint)] for fold in configuration.folds},
            }
            for configuration in result.configurations
        ],
    }


def _beside(path: Path) -> Mapping[str, str]:
    """What a lone checkpoint needs besides itself."""
    if path.suffix.casefold() == ".zip":
        return {}
    files = [folder / name for folder in (path.parent, path.parent.parent) for name in ("plans.json", "dataset.json")]
    return {f"{file.parent.name}/{file.name}": _file_digest(file) for file in files if file.is_file()}


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(document: Mapping[str, Any]) -> str:
    # Names of labels keep their order: it is that of the heads.
    text = json.dumps([_KIND, version("seggate"), document])
    return hashlib.sha256(text.encode()).hexdigest()
