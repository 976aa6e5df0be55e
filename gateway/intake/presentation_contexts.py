"""What the receiver negotiates: SOP classes and transfer syntaxes, and why the others are refused (REC-06, REC-07)."""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.uid import UID
from pynetdicom import AllStoragePresentationContexts
from pynetdicom.presentation import PresentationContext, build_context

VERIFICATION = "1.2.840.10008.1.1"

# In the order of preference: the acceptor chooses the first of these that the requestor proposed for a context
# (PS3.8 9.3.3.2). Uncompressed first, because a sender that offers it can always send it; big endian, retired, last.
TRANSFER_SYNTAXES: tuple[str, ...] = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless, process 14
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
)

# UID prefix -> why a context that offers only this is refused with "transfer syntaxes not supported".
REFUSED_TRANSFER_SYNTAXES: dict[str, str] = {
    "1.2.840.10008.1.2.4.100": "MPEG-2 video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.101": "MPEG-2 video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.102": "MPEG-4 video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.103": "MPEG-4 video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.104": "MPEG-4 video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.105": "MPEG-4 video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.106": "MPEG-4 video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.107": "HEVC video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.4.108": "HEVC video: no model takes video, and frames have no geometry",
    "1.2.840.10008.1.2.7": "SMPTE real-time video: not an object that can be stored",
    "1.2.840.10008.1.2.4.94": "JPIP: the pixels are elsewhere, a stored object would be empty",
    "1.2.840.10008.1.2.4.95": "JPIP: the pixels are elsewhere, a stored object would be empty",
    "1.2.840.10008.1.2.4.204": "JPIP: the pixels are elsewhere, a stored object would be empty",
    "1.2.840.10008.1.2.4.205": "JPIP: the pixels are elsewhere, a stored object would be empty",
    "1.2.840.10008.1.2.4.92": "JPEG 2000 Part 2 multi-component: no decoder here",
    "1.2.840.10008.1.2.4.93": "JPEG 2000 Part 2 multi-component: no decoder here",
    "1.2.840.10008.1.2.4.52": "retired JPEG process: no decoder here",
    "1.2.840.10008.1.2.4.53": "retired JPEG process: no decoder here",
    "1.2.840.10008.1.2.4.54": "retired JPEG process: no decoder here",
    "1.2.840.10008.1.2.4.55": "retired JPEG process: no decoder here",
    "1.2.840.10008.1.2.4.56": "retired JPEG process: no decoder here",
    "1.2.840.10008.1.2.8.1": "deflated frames (PS3.5 A.4.13): no decoder here",
}

# Storage SOP classes that pynetdicom does not list: retired ones that old modalities still send, and newer ones.
_MORE_STORAGE_CLASSES: tuple[str, ...] = (
    "1.2.840.10008.5.1.4.1.1.3",  # Ultrasound Multi-frame Image (retired)
    "1.2.840.10008.5.1.4.1.1.5",  # Nuclear Medicine Image (retired)
    "1.2.840.10008.5.1.4.1.1.6",  # Ultrasound Image (retired)
    "1.2.840.10008.5.1.4.1.1.8",  # Standalone Overlay (retired)
    "1.2.840.10008.5.1.4.1.1.9",  # Standalone Curve (retired)
    "1.2.840.10008.5.1.4.1.1.10",  # Standalone Modality LUT (retired)
    "1.2.840.10008.5.1.4.1.1.11",  # Standalone VOI LUT (retired)
    "1.2.840.10008.5.1.4.1.1.12.3",  # X-Ray Angiographic Bi-Plane Image (retired)
    "1.2.840.10008.5.1.4.1.1.66.7",  # Label Map Segmentation
    "1.2.840.10008.5.1.4.1.1.66.8",  # Height Map Segmentation
    "1.2.840.10008.5.1.4.1.1.77.1",  # VL Image (trial)
    "1.2.840.10008.5.1.4.1.1.77.2",  # VL Multi-frame Image (trial)
    "1.2.840.10008.5.1.4.1.1.88.1",  # Text SR (trial)
    "1.2.840.10008.5.1.4.1.1.88.2",  # Audio SR (trial)
    "1.2.840.10008.5.1.4.1.1.88.3",  # Detail SR (trial)
    "1.2.840.10008.5.1.4.1.1.88.4",  # Comprehensive SR (trial)
    "1.2.840.10008.5.1.4.1.1.129",  # Standalone PET Curve (retired)
    "1.2.840.10008.5.1.4.1.1.501.1",  # DICOS CT Image
    "1.2.840.10008.5.1.4.1.1.601.1",  # Eddy Current Image
    "1.2.840.10008.5.1.4.1.1.601.2",  # Eddy Current Multi-frame Image
)

_STANDARD_PREFIX = "1.2.840.10008."
_STANDARD_STORAGE_PREFIX = "1.2.840.10008.5.1.4.1.1."


def storage_sop_classes() -> tuple[str, ...]:
    """All storage SOP classes that are accepted, each once."""
    listed = (str(context.abstract_syntax) for context in AllStoragePresentationContexts)
    return tuple(dict.fromkeys((*listed, *_MORE_STORAGE_CLASSES)))


def supported_contexts() -> list[PresentationContext]:
    """The acceptor's contexts: Verification, and every storage SOP class in every transfer syntax above."""
    syntaxes = [UID(uid) for uid in TRANSFER_SYNTAXES]
    verification = build_context(VERIFICATION)
    return [verification, *(build_context(uid, syntaxes) for uid in storage_sop_classes())]


def contexts_for_unknown(requested: Iterable[str], known: frozenset[str]) -> list[PresentationContext]:
    """Contexts for the requested SOP classes that nobody knows, for `unknown_sop_classes = "store"` (REC-07).

    Private SOP classes and standard ones under the storage root are taken as storage; other standard ones (query,
    worklist, ...) are services that the receiver does not offer, and stay refused.
    """
    unknown = [uid for uid in dict.fromkeys(requested) if uid not in known and _may_be_storage(uid)]
    return [build_context(uid, [UID(syntax) for syntax in TRANSFER_SYNTAXES]) for uid in unknown]


def refusal_reason(transfer_syntax_uid: str) -> str | None:
    """Why a transfer syntax is refused at negotiation; None when it is accepted."""
    if transfer_syntax_uid in TRANSFER_SYNTAXES:
        return None
    parts = transfer_syntax_uid.split(".")
    for count in range(len(parts), 0, -1):
        reason = REFUSED_TRANSFER_SYNTAXES.get(".".join(parts[:count]))
        if reason is not None:
            return reason
    return "unknown or private transfer syntax: it could be stored, but never be read"


def _may_be_storage(uid: str) -> bool:
    return not uid.startswith(_STANDARD_PREFIX) or uid.startswith(_STANDARD_STORAGE_PREFIX)
