"""Derived UIDs: equal input, equal UID; any other input, another UID."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.results.identity import (
    ModelIdentity,
    ResultIdentity,
    frame_of_reference_uid,
    series_instance_uid,
    sop_instance_uid,
    tracking_uid,
)

MODEL = ModelIdentity(name="m", version="1.0.0", weights_digest="a" * 64, configuration_digest="b" * 64)
IDENTITY = ResultIdentity(
    study_instance_uid="1.2.3", series_instance_uid="1.2.3.4", part="", model=MODEL, content_digest="c" * 64
)


def uid(
    identity: ResultIdentity = IDENTITY, role: str = "SEG", sop_class: str = "1.2", encoding: str = "BINARY"
) -> str:
    return sop_instance_uid(identity, role=role, sop_class_uid=sop_class, encoding=encoding)


@pytest.mark.requirement("QUE-27")
def test_uids_never_change_between_versions_of_the_program() -> None:
    """Written down once: a change would send a second result for every study that is retried after an upgrade."""
    assert uid() == "2.25.169596273334292003592176144747971374234"
    assert (
        series_instance_uid(IDENTITY, role="SEG", encoding="BINARY") == "2.25.186241532263343971684380758957721146376"
    )
    assert tracking_uid(IDENTITY, segment_value=1) == "2.25.244215578249456535341038932399434114945"


@pytest.mark.requirement("QUE-27")
@pytest.mark.parametrize(
    "other",
    [
        uid(replace(IDENTITY, study_instance_uid="1.2.4")),
        uid(replace(IDENTITY, series_instance_uid="1.2.3.5")),
        uid(replace(IDENTITY, part="EchoTime=4.9")),
        uid(replace(IDENTITY, model=replace(MODEL, name="n"))),
        uid(replace(IDENTITY, model=replace(MODEL, version="1.0.1"))),
        uid(replace(IDENTITY, model=replace(MODEL, weights_digest="d" * 64))),
        uid(replace(IDENTITY, model=replace(MODEL, configuration_digest="d" * 64))),
        uid(replace(IDENTITY, content_digest="d" * 64)),
        uid(role="SR"),
        uid(sop_class="1.3"),
        uid(encoding="LABELMAP"),
    ],
    ids=[
        "study",
        "series",
        "part",
        "name",
        "version",
        "weights",
        "configuration",
        "content",
        "role",
        "class",
        "encoding",
    ],
)
def test_every_ingredient_counts(other: str) -> None:
    assert other != uid()


def test_neighbouring_fields_cannot_be_confused() -> None:
    one = replace(IDENTITY, study_instance_uid="1.2", series_instance_uid="31.2")
    two = replace(IDENTITY, study_instance_uid="1.23", series_instance_uid="1.2")
    assert uid(one) != uid(two)


@pytest.mark.parametrize("value", [uid(), frame_of_reference_uid(IDENTITY), tracking_uid(IDENTITY, segment_value=7)])
def test_uids_are_legal(value: str) -> None:
    assert value.startswith("2.25.")
    assert len(value) <= 64
    assert not value[5:].startswith("0")


def test_tracking_does_not_depend_on_the_encoding_but_on_the_segment() -> None:
    assert tracking_uid(IDENTITY, segment_value=1) != tracking_uid(IDENTITY, segment_value=2)
