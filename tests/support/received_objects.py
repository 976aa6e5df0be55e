"""Small objects, and a receiver's settings, for tests of intake."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from gateway.destination_settings import DestinationSettings
from gateway.settings import GatewaySettings, ReceiverSettings, SenderSettings, Settings
from tests.support.scripted_peer import CT_IMAGE

STUDY, SERIES = "1.2.826.0.1.1", "1.2.826.0.1.1.1"


def intake_settings(folder: Path, *, senders: tuple[SenderSettings, ...] | None = None, **receiver: Any) -> Settings:
    """Settings with a receiver on a free loopback port that knows CT1 and CT2."""
    values: dict[str, Any] = {"port": 0, "host": "127.0.0.1", "reserve_mb": 0, "drain_timeout_s": 2}
    known = (SenderSettings(ae_title="CT1"), SenderSettings(ae_title="CT2"))
    return Settings(
        folder=folder,
        gateway=GatewaySettings(
            state_dir=folder / "state",
            receiver=ReceiverSettings(**(values | receiver)),
            senders=known if senders is None else senders,
        ),
        destinations=DestinationSettings(),
    )


def element(tag: int, vr: str, value: bytes | str | int) -> bytes:
    """One element, Explicit VR Little Endian."""
    if isinstance(value, int):
        value = struct.pack("<H", value)
    if isinstance(value, str):
        value = value.encode("utf-8")
    if len(value) % 2:
        value += b"\0" if vr in {"UI", "OB"} else b" "
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in {"OB", "OW", "SQ", "UN", "UT"}:
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def data_set(
    sop_instance_uid: str,
    *,
    study: str | None = STUDY,
    series: str | None = SERIES,
    sop_class: str = CT_IMAGE,
    pixels: bytes = b"\1\2" * 16,
    extra: bytes = b"",
    **patient: str,
) -> bytes:
    """A legal 4x4 CT image, Explicit VR Little Endian. `extra` is put behind SeriesInstanceUID (0020,000E).

    `patient`: id, name, birth_date, issuer.
    """
    parts = [
        element(0x00080005, "CS", "ISO_IR 192"),
        element(0x00080016, "UI", sop_class),
        element(0x00080018, "UI", sop_instance_uid),
        element(0x00080060, "CS", "CT"),
        element(0x0008103E, "LO", "Thorax"),
        element(0x00100010, "PN", patient.get("name", "")),
        element(0x00100020, "LO", patient.get("id", "")),
        element(0x00100021, "LO", patient.get("issuer", "")),
        element(0x00100030, "DA", patient.get("birth_date", "")),
        b"" if study is None else element(0x0020000D, "UI", study),
        b"" if series is None else element(0x0020000E, "UI", series),
        extra,
        element(0x00280002, "US", 1),
        element(0x00280010, "US", 4),
        element(0x00280011, "US", 4),
        element(0x00280100, "US", 16),
        element(0x7FE00010, "OW", pixels),
    ]
    return b"".join(parts)
