"""DICOM folders → cases: each volume of each series is one, named by a hash that carries nothing of the patient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.bundle import Bundle
from engine.manifest import Contract
from engine.nifti import write_nifti
from engine.segment_statistics import SegmentStatistics
from engine.volume import Geometry, LabelMap, Volume
from engine.whole_file import whole_file
from gateway.errors import Rejected
from gateway.prediction.request import SegEncoding, UsageRefused
from gateway.results.contract import judge
from gateway.results.series import SeriesPart, decode, read_series
from gateway.training_data.source_scan import Source, SourceSeries, scan, scan_files

_NAME_DIGITS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesCase:
    """One volume of a series, its headers read. See gateway.prediction.cases.Case."""

    name: str
    part: SeriesPart
    channels: int
    ending: str = ".nii.gz"

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(frame.file for frame in self.part.frames))

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def source(self) -> Mapping[str, Any]:
        return MappingProxyType(
            {
                "study_instance_uid": self.part.study_instance_uid,
                "series_instance_uid": self.part.series_instance_uid,
                "part": self.part.part,
            }
        )

    def geometry(self) -> Geometry:
        return self.part.geometry

    def doubts(self, contract: Contract) -> list[str]:
        """Every criterion of the contract, as in the gateway: what it excludes is not run."""
        failed = [f for f in judge(self.part, contract, channels=self.channels) if not f.ok]
        if failed:
            raise Rejected("the model is not for this series: " + "; ".join(f"{f.name}: {f.detail}" for f in failed))
        return [f"{finding.kind}: {finding.detail}" for finding in self.part.findings]

    def read(self) -> Volume:
        volume = decode(self.part).volume
        if volume is None:
            raise Rejected(f"series {self.part.series_instance_uid}: no pixel data")
        return volume

    def write_labels(self, labels: LabelMap, path: Path) -> None:
        try:
            write_nifti(labels, path)
        except ValueError as error:
            raise Rejected(f"{error}; take --format seg, which can") from error

    def grid_properties(self) -> Mapping[str, Any]:
        geometry = self.part.geometry
        return {
            "spacing": list(geometry.spacing_mm),
            "sitk_stuff": {
                "spacing": list(geometry.spacing_mm[::-1]),
                "origin": list(geometry.origin_mm),
                "direction": geometry.direction.ravel().tolist(),
            },
        }

    def write_seg(
        self,
        labels: LabelMap,
        segments: Sequence[SegmentStatistics],
        bundle: Bundle,
        path: Path,
        *,
        encoding: SegEncoding,
        software_version: str,
        created_at: datetime,
    ) -> None:
        """The DICOM Segmentation of the result. Its UIDs are of this run: the time goes into them, because the content
        shows it. Raises Rejected, OSError."""
        # highdicom is slow to import and of no use to those who want NIfTI.
        from gateway.results.content import ResultContent, SegmentContent
        from gateway.results.identity import ModelIdentity, ResultIdentity
        from gateway.results.segmentation import encode_segmentation
        from gateway.results.source_header import identified

        part = self.part
        content = ResultContent(
            identity=ResultIdentity(
                study_instance_uid=part.study_instance_uid,
                series_instance_uid=part.series_instance_uid,
                part=part.part,
                model=ModelIdentity(
                    name=bundle.name,
                    version=bundle.semver,
                    weights_digest=bundle.weights_digest,
                    configuration_digest=bundle.configuration_digest,
                ),
                content_digest=_content_digest(part, created_at),
            ),
            labels=labels.array,
            geometry=part.geometry,
            frames=part.frames,
            header=identified(part.headers),
            modality=part.modality,
            frame_of_reference_uid=part.frame_of_reference_uid,
            segments=tuple(
                SegmentContent(
                    number=number,
                    value=spec.value,
                    region=spec.region,
                    name=spec.name,
                    category=spec.category,
                    type=spec.type,
                    laterality=spec.laterality,
                    colour=spec.colour,
                    voxels=measured.voxels,
                    volume_ml=measured.volume_ml,
                    mean_intensity=measured.mean_intensity[0] if measured.mean_intensity else None,
                    confidence=measured.confidence,
                    unit="[hnsf'U]" if part.modality == "CT" else "1",
                )
                for number, (spec, measured) in enumerate(zip(bundle.labels, segments, strict=True), start=1)
            ),
            verdict="review",  # nobody has judged it, and no check has
            checks=(),
            software_version=software_version,
            created_at=created_at,
        )
        made = encode_segmentation(content, encoding=encoding)
        with whole_file(path) as partial:
            partial.write_bytes(made.data)


@dataclass(frozen=True, kw_only=True)
class FoundSeries:
    """`faults` are (file or case, reason); `notes` say what was passed over."""

    cases: list[SeriesCase]
    faults: list[tuple[str, str]]
    notes: list[str]


def series_in_folder(folder: Path, *, channels: int, name: str | None) -> FoundSeries:
    """The volumes of all image series below `folder`; none where there is no DICOM image.

    Raises UsageRefused for a `name` where there are several, OSError.
    """
    return _found(scan(folder, nifti=None, processes=1), channels, name)


def series_of_files(files: Sequence[Path], *, channels: int, name: str | None) -> FoundSeries:
    """The same for given DICOM files."""
    return _found(scan_files(files, root=files[0].parent), channels, name)


def _found(source: Source, channels: int, name: str | None) -> FoundSeries:
    cases: list[SeriesCase] = []
    faults = [(fault.file or "a file", fault.cause) for fault in source.faults]
    for series in source.series.values():
        try:
            parts = read_series(series.files, only_headers=True)
        except Rejected as error:
            faults.append((case_name(series.series_instance_uid, ""), str(error)))
            continue
        cases += [
            SeriesCase(name=case_name(series.series_instance_uid, part.part), part=part, channels=channels)
            for part in parts
        ]
    if name is not None:
        if len(cases) != 1:
            raise UsageRefused(f"--name is for one case, and there are {len(cases)}: {_listed(source.series)}")
        cases = [SeriesCase(name=name, part=cases[0].part, channels=channels)]
    notes = [f"{count} passed over: {kind}" for kind, count in source.passed_over.items()]
    return FoundSeries(cases=cases, faults=faults, notes=notes)


def case_name(series_instance_uid: str, part: str) -> str:
    """The same for the same series wherever it lies; says nothing of it."""
    digest = hashlib.sha256(f"{series_instance_uid}\n{part}".encode()).hexdigest()
    return f"series-{digest[:_NAME_DIGITS]}"


def _listed(series: Mapping[str, SourceSeries]) -> str:
    return ", ".join(f"{s.modality} series {uid}" for uid, s in list(series.items())[:5])


def _content_digest(part: SeriesPart, created_at: datetime) -> str:
    lines = [f"{frame.sop_instance_uid} {frame.frame_number}" for frame in part.frames]
    return hashlib.sha256("\n".join([created_at.isoformat(), *lines]).encode()).hexdigest()
