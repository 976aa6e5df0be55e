"""What tells the volumes of one series apart: the attributes, where each is found, and when two values are one.

Any key may split frames at the same positions (`slice_geometry`). A key of contrast says more: one volume never holds
two of its values, wherever its slices lie. What varies within a normal volume is no contrast: trigger and repetition
times follow the heart or the breath, AcquisitionNumber the parts of a stitched CT, AcquisitionTime every slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

ABSENT = "absent"
"""The value of a frame that lacks the attribute."""


@dataclass(frozen=True, kw_only=True)
class SplitKey:
    """Where a value is found, and what it means for a volume.

    paths: sequences and keyword, the first that has a value counts; paths with a sequence are those of functional
    groups. clause: of PS3.3, in the order of the paths. contrast: a volume holds one value of it. tolerance: numbers
    this close are one value, in the attribute's unit; None for text. compared: first and end index of the values of a
    multi-valued attribute that are contrast.
    """

    paths: tuple[tuple[str, ...], ...]
    clause: str
    contrast: bool = False
    tolerance: float | None = None
    compared: tuple[int, int | None] = (0, None)


_FRAME = "FrameContentSequence"
_MR_TYPE = "MRImageFrameTypeSequence"
_TIMING = "MRTimingAndRelatedParametersSequence"
_DIFFUSION = "MRDiffusionSequence"

SPLIT_KEYS: Mapping[str, SplitKey] = MappingProxyType(
    {
        # Value 3 says what the image is (M, AXIAL, ADC), value 4 what was made of it (WATER, MIP, NORM).
        "ImageType": SplitKey(
            paths=(
                ("MRImageFrameTypeSequence", "FrameType"),
                ("CTImageFrameTypeSequence", "FrameType"),
                ("ImageType",),
            ),
            clause="C.8.13.5.1, C.8.15.3.1, C.7.6.1.1.2",
            contrast=True,
            compared=(2, 4),
        ),
        "ComplexImageComponent": SplitKey(
            paths=((_MR_TYPE, "ComplexImageComponent"), ("ComplexImageComponent",)),
            clause="C.8.13.3.1.1",
            contrast=True,
        ),
        "EchoTime": SplitKey(
            paths=(("MREchoSequence", "EffectiveEchoTime"), ("EchoTime",)),
            clause="C.8.13.5.4, C.8.3.1",
            contrast=True,
            tolerance=0.01,
        ),
        "EchoNumbers": SplitKey(paths=(("EchoNumbers",),), clause="C.8.3.1", contrast=True, tolerance=0.0),
        "DiffusionBValue": SplitKey(
            paths=((_DIFFUSION, "DiffusionBValue"), ("DiffusionBValue",)),
            clause="C.8.13.5.9",
            contrast=True,
            tolerance=1.0,
        ),
        "DiffusionGradientOrientation": SplitKey(
            paths=(
                (_DIFFUSION, "DiffusionGradientDirectionSequence", "DiffusionGradientOrientation"),
                ("DiffusionGradientOrientation",),
            ),
            clause="C.8.13.5.9",
        ),
        "TemporalPositionIdentifier": SplitKey(
            paths=((_FRAME, "TemporalPositionIndex"), ("TemporalPositionIdentifier",)),
            clause="C.7.6.16.2.2, C.8.3.1",
            contrast=True,
            tolerance=0.0,
        ),
        "TriggerTime": SplitKey(
            paths=(("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"), ("TriggerTime",)),
            clause="C.7.6.16.2.7, C.8.3.1",
            tolerance=0.0,
        ),
        "InversionTime": SplitKey(
            paths=(("MRModifierSequence", "InversionTimes"), ("InversionTime",)),
            clause="C.8.13.5.5, C.8.3.1",
            contrast=True,
            tolerance=1.0,
        ),
        "FlipAngle": SplitKey(
            paths=((_TIMING, "FlipAngle"), ("FlipAngle",)),
            clause="C.8.13.5.2, C.8.3.1",
            contrast=True,
            tolerance=0.1,
        ),
        "RepetitionTime": SplitKey(
            paths=((_TIMING, "RepetitionTime"), ("RepetitionTime",)), clause="C.8.13.5.2, C.8.3.1", tolerance=0.0
        ),
        "ContrastBolusAgent": SplitKey(
            paths=(("ContrastBolusUsageSequence", "ContrastBolusAgentPhase"), ("ContrastBolusAgent",)),
            clause="C.7.6.16.2.12, C.7.6.4",
            contrast=True,
        ),
        "KVP": SplitKey(
            paths=(("CTXRayDetailsSequence", "KVP"), ("KVP",)),
            clause="C.8.15.3.9, C.8.2.1",
            contrast=True,
            tolerance=0.5,
        ),
        "ConvolutionKernel": SplitKey(
            paths=(("CTReconstructionSequence", "ConvolutionKernel"), ("ConvolutionKernel",)),
            clause="C.8.15.3.7, C.8.2.1",
            contrast=True,
        ),
        "ReconstructionDiameter": SplitKey(
            paths=(("CTReconstructionSequence", "ReconstructionDiameter"), ("ReconstructionDiameter",)),
            clause="C.8.15.3.7, C.8.2.1",
            tolerance=0.0,
        ),
        "AcquisitionNumber": SplitKey(
            paths=((_FRAME, "FrameAcquisitionNumber"), ("AcquisitionNumber",)),
            clause="C.7.6.16.2.2, C.7.6.1",
            tolerance=0.0,
        ),
        "AcquisitionTime": SplitKey(
            paths=((_FRAME, "FrameAcquisitionDateTime"), ("AcquisitionTime",)), clause="C.7.6.16.2.2, C.7.6.1"
        ),
    }
)
"""In the order in which they are tried."""
CONTRAST_KEYS = tuple(keyword for keyword, key in SPLIT_KEYS.items() if key.contrast)


def merged(values: Iterable[str], tolerance: float | None) -> dict[str, str]:
    """The value that stands for each one: the lowest of those within the tolerance, the value itself for text."""
    one = {value: value for value in values}
    numbers = [] if tolerance is None else sorted((n, v) for v in one if (n := _number(v)) is not None)
    lowest = (-math.inf, "")
    for number, value in numbers:
        if number - lowest[0] > (tolerance or 0.0):
            lowest = (number, value)
        one[value] = lowest[1]
    return one


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
