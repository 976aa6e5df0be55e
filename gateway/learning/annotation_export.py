"""Cases that wait for labels → NIfTI files for whoever draws them, without names of patients.

    FOLDER/MODEL/
      images/RESULT.nii.gz    labels/RESULT.nii.gz    what the model found, to be corrected
      labels.json             value → name

Files are named by results, so that `seggate corrections add RESULT --nifti FILE` takes a corrected one back. A label
map that is there is never written over: somebody may have drawn in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError
from engine.json_writer import write_json
from engine.nifti import write_image
from engine.parallel import Progress
from engine.volume import AS_STORED
from gateway.errors import Rejected
from gateway.learning.result_source import image_of, result_source
from gateway.results.inference import load_labels
from gateway.training_data.case_conversion import DISK_FULL
from storage.database import Database
from storage.errors import ObjectChanged, ObjectMissing
from storage.spool import Spool

_ENDING = ".nii.gz"


@dataclass(frozen=True, kw_only=True)
class ExportedCases:
    """`written` now, `there` already; `left_out`: result → why it cannot be written."""

    folder: Path
    written: tuple[str, ...]
    there: tuple[str, ...]
    left_out: Mapping[str, str]


def export_for_annotation(
    database: Database,
    spool: Spool,
    result_ids: Sequence[str],
    folder: Path,
    *,
    progress: Progress | None = None,
) -> ExportedCases:
    """Of results of one model, in the voxel order of their series. Raises OSError when the folder cannot be written,
    DatabaseAway."""
    written, there, left_out = [], [], dict[str, str]()
    names: dict[int, str] = {}
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for done, result_id in enumerate(result_ids):
        if progress is not None:
            progress(done, len(result_ids))
        image_file, label_file = (folder / sub / f"{result_id}{_ENDING}" for sub in ("images", "labels"))
        try:
            source = result_source(database, spool, result_id)
            names |= {int(m["value"]): str(m["name"]) for m in source.result.measurements or []}
            if image_file.exists() and label_file.exists():
                there.append(result_id)
                continue
            image, change = image_of(source, AS_STORED)
            labels = load_labels(spool, source.result)
            if labels.shape != image.shape:
                raise Rejected(f"result {result_id}: labels {labels.shape}, images {image.shape} (z, y, x)")
            if not label_file.exists():
                write_image(change.apply(labels), change.target, label_file)
            write_image(image, change.target, image_file)
        except (Rejected, EngineError, ObjectMissing, ObjectChanged, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            left_out[result_id] = str(error)
            continue
        written.append(result_id)
    if progress is not None:
        progress(len(result_ids), len(result_ids))
    if names:
        write_json({str(value): name for value, name in sorted(names.items())}, folder / "labels.json")
    return ExportedCases(folder=folder, written=tuple(written), there=tuple(there), left_out=left_out)
