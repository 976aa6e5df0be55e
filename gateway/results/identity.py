"""Derived UIDs: the same input makes the same result object, whoever retries and however often (QUE-27).

UID = "2.25." followed by the decimal value of a version 5 UUID (PS3.5 B.2) over study, series, part, model, version,
weights digest, configuration digest, content digest, and what the UID is for. Nothing here reads a clock or a
random source, and nothing heavy is imported: the intake uses MANUFACTURER.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

MANUFACTURER = "seggate"
"""Manufacturer of every object we make; how another gateway's results are recognised (OUT-46)."""

CODING_SCHEME = "99SEGGATE"
"""Designator of our private coding scheme, for what no public scheme names."""

_NAMESPACE = uuid.UUID("5f0c0d0e-7a53-5d0f-9c3e-2b6f4f1f7a11")


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """The model that made a result. Both digests are hex SHA-256 as docs/model-bundle.md defines them."""

    name: str
    version: str
    weights_digest: str
    configuration_digest: str


@dataclass(frozen=True, kw_only=True)
class ResultIdentity:
    """What a result is derived from.

    part: which volume of the series ("" when it is one). content_digest: of the objects that the study version is
    made of, so that late slices make a new result.
    """

    study_instance_uid: str
    series_instance_uid: str
    part: str
    model: ModelIdentity
    content_digest: str


def sop_instance_uid(identity: ResultIdentity, *, role: str, sop_class_uid: str, encoding: str) -> str:
    """SOP Instance UID of one object of the result. role: SEG, SR, SC or notice."""
    return _uid(identity, "instance", role, sop_class_uid, encoding)


def series_instance_uid(identity: ResultIdentity, *, role: str, encoding: str) -> str:
    """Series Instance UID: every result object has a series of its own."""
    return _uid(identity, "series", role, encoding)


def tracking_uid(identity: ResultIdentity, *, segment_value: int) -> str:
    """Tracking UID of a segment; the same in SEG, SR and SC, whatever the encoding."""
    return _uid(identity, "tracking", str(segment_value))


def component_uid(identity: ResultIdentity, *, role: str, encoding: str, component: str) -> str:
    """UID of something inside an object, such as its dimension organization."""
    return _uid(identity, "component", role, encoding, component)


def frame_of_reference_uid(identity: ResultIdentity) -> str:
    """For a source series without Frame of Reference UID; the same for every result of that series."""
    return _as_uid(["frame of reference", identity.study_instance_uid, identity.series_instance_uid])


def device_uid(model: ModelIdentity) -> str:
    """UID of the observing device: the gateway with this very model."""
    return _as_uid(["device", model.name, model.version, model.weights_digest, model.configuration_digest])


def _uid(identity: ResultIdentity, *purpose: str) -> str:
    return _as_uid(
        [
            identity.study_instance_uid,
            identity.series_instance_uid,
            identity.part,
            identity.model.name,
            identity.model.version,
            identity.model.weights_digest,
            identity.model.configuration_digest,
            identity.content_digest,
            *purpose,
        ]
    )


def _as_uid(fields: list[str]) -> str:
    # JSON keeps the fields apart: ("ab", "c") and ("a", "bc") must differ.
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(fields, ensure_ascii=True)).int}"
