"""The volume that a result was made from, read again from the spool exactly as the model got it, and as NIfTI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import select

from engine.volume import Reorientation, reorientation
from gateway.errors import Rejected
from gateway.results.inference import select_part
from gateway.results.orders import series_files
from gateway.results.series import SeriesPart, decode, read_series
from gateway.training_data.case_conversion import series_grid, written_values
from storage.database import Database
from storage.records import Instance, Result, Study, StudyVersion
from storage.spool import Spool


@dataclass(frozen=True, kw_only=True)
class ResultSource:
    """A result's rows and the files of its series. `digests` are those of the objects' data sets, in a fixed order:
    what the images depend on."""

    result: Result
    study: Study
    files: tuple[Path, ...]
    digests: tuple[str, ...]

    def part(self) -> SeriesPart:
        """The volume without voxels (`gateway.results.series.decode` adds them). Raises Rejected when the series is not
        what it was, OSError when a file is not there."""
        return select_part(read_series(self.files, only_headers=True), self.result.part)


def result_source(database: Database, spool: Spool, result_id: str) -> ResultSource:
    """Raises ObjectMissing when an object of the series is not in the spool."""
    with database.reading() as session:
        result = session.get_one(Result, result_id)
        version = session.get_one(StudyVersion, result.version_id)
        files = series_files(session, spool, version, result)
        objects = session.execute(
            select(Instance.object_id, Instance.digest).where(Instance.object_id.in_([file.stem for file in files]))
        )
        return ResultSource(
            result=result,
            study=session.get_one(Study, result.study_instance_uid),
            files=files,
            digests=tuple(sorted(digest for _, digest in objects)),
        )


def image_of(source: ResultSource, orientation: str) -> tuple[NDArray[Any], Reorientation]:
    """The image (Z, Y, X) in the voxel order `orientation`, as it is written, and how its series' order was changed:
    labels on the series take the same way. Values are those that the model got.

    Raises Rejected (also AttributeRejected) for a series that cannot be read or lies on no even grid, as NIfTI needs.
    """
    part = source.part()
    change = reorientation(series_grid(part), orientation)
    volume = decode(part).volume
    if volume is None:
        raise Rejected(f"series {part.series_instance_uid}: no pixel data")
    return change.apply(written_values(volume.array[0])), change
