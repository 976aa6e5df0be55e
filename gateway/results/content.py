"""What is written into a result's objects: one value, from which SEG, SR, SC and pictures are encoded.

Everything that could differ between two runs is in here, the time of creation included, so that encoding is a pure
function of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from engine.manifest import Code
from engine.volume import Geometry
from gateway.errors import Rejected
from gateway.results.identity import ResultIdentity, tracking_uid

Encoding = Literal["BINARY", "LABELMAP"]


class SourceFrame(Protocol):
    """Slice z of the source volume (`gateway.results.series.SourceFrame`)."""

    @property
    def sop_class_uid(self) -> str: ...
    @property
    def sop_instance_uid(self) -> str: ...
    @property
    def frame_number(self) -> int | None: ...
    @property
    def position_mm(self) -> tuple[float, float, float]: ...


class QualityCheck(Protocol):
    """One check of the QA module (`gateway.results.quality.Check`); verdict is pass, review or hold; bound is None but
    for estimates."""

    @property
    def name(self) -> str: ...
    @property
    def segment(self) -> str | None: ...
    @property
    def value(self) -> float | str: ...
    @property
    def limit(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def bound(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class ObjectReference:
    """A DICOM object of ours that another one points at."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str


@dataclass(frozen=True, kw_only=True)
class Superseded:
    """The objects of the earlier result that this one replaces (CMP-17). image: SEG, or SC where it has no SEG."""

    image: ObjectReference | None = None
    report: ObjectReference | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentContent:
    """One segment of a result.

    number: segment number in the SEG, 1, 2, … in the order of the bundle's labels. value: the label's value; region:
    the label values that the segment is made of. unit: UCUM code of mean_intensity, "[hnsf'U]" or "1".
    mean_intensity and confidence are None for an empty segment. colour: sRGB 0-255.
    """

    number: int
    value: int
    region: tuple[int, ...]
    name: str
    category: Code
    type: Code
    laterality: Literal["left", "right"] | None
    colour: tuple[int, int, int]
    voxels: int
    volume_ml: float
    mean_intensity: float | None
    confidence: float | None
    unit: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ResultContent:
    """One model's result for one volume of one series.

    labels: (Z, Y, X) integers on the source grid `geometry`; frames[z] is source slice z; header: attributes of the
    first slice (or of the enhanced object). modality: of the source. created_at: fixed once by the caller; its wall
    clock is what the objects show. Raises Rejected when the parts do not fit together.
    """

    identity: ResultIdentity
    labels: NDArray[np.unsignedinteger[Any]]
    geometry: Geometry
    frames: Sequence[SourceFrame]
    header: Dataset
    modality: str
    frame_of_reference_uid: str
    segments: tuple[SegmentContent, ...]
    verdict: str
    checks: Sequence[QualityCheck]
    software_version: str
    created_at: datetime
    supersedes: Superseded = field(default_factory=Superseded)

    def __post_init__(self) -> None:
        where = f"series {self.identity.series_instance_uid}"
        if self.labels.shape != self.geometry.shape or len(self.frames) != self.labels.shape[0]:
            raise Rejected(
                f"{where}: labels {self.labels.shape}, grid {self.geometry.shape} and {len(self.frames)} source "
                "frames do not fit together; read the series again"
            )
        if [s.number for s in self.segments] != list(range(1, len(self.segments) + 1)):
            raise Rejected(f"{where}: segment numbers must be 1, 2, … in order; check the model bundle's labels")

    @cached_property
    def overlapping(self) -> bool:
        """Whether two segments share a label value, as in a model trained on regions."""
        values = [value for segment in self.segments for value in set(segment.region)]
        return len(values) != len(set(values))

    def segment_number_table(self) -> NDArray[np.unsignedinteger[Any]]:
        """table[label value] = segment number, 0 outside, in 8 bits where they suffice, else 16; only for segments that
        do not overlap."""
        kind = np.uint8 if len(self.segments) < 256 else np.uint16
        table: NDArray[np.unsignedinteger[Any]] = np.zeros(int(self.labels.max(initial=0)) + 1, dtype=kind)
        for segment in self.segments:
            for value in segment.region:
                if 0 < value < table.size:
                    table[value] = segment.number
        return table

    def mask(self, segment: SegmentContent) -> NDArray[np.bool_]:
        """(Z, Y, X), true inside the segment."""
        return np.isin(self.labels, [value for value in segment.region if value > 0])

    def tracking_uid(self, segment: SegmentContent) -> str:
        """Shared by SEG, SR and SC."""
        return tracking_uid(self.identity, segment_value=segment.value)

    def tracking_identifier(self, segment: SegmentContent) -> str:
        """Readable form of the tracking UID, at most 64 characters."""
        model = self.identity.model
        return f"{model.name[:24]} {model.version[:12]} {segment.name}"[:64]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What was done to a source attribute on its way into a result, without its value.

    action: dropped, emptied, replaced, shortened, cleaned or kept (illegal, but changing it would change identity).
    """

    attribute: str
    tag: str
    action: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class EncodedObject:
    """A finished DICOM file: written once to the spool and sent unchanged ever after.

    chunks: the file's bytes piece by piece, made again at each call and always the same; a Segmentation is larger than
    all that it is made from.
    """

    role: str
    encoding: str
    chunks: Callable[[], Iterable[bytes]] = field(repr=False)
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    repairs: tuple[Repair, ...]

    @property
    def data(self) -> bytes:
        """The whole file."""
        return b"".join(self.chunks())

    @property
    def reference(self) -> ObjectReference:
        return ObjectReference(
            sop_class_uid=self.sop_class_uid,
            sop_instance_uid=self.sop_instance_uid,
            series_instance_uid=self.series_instance_uid,
        )
