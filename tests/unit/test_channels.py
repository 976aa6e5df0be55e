"""gateway.training_data.channels: which series a channel takes."""

from __future__ import annotations

import pytest

from gateway.errors import Rejected
from gateway.training_data.channels import channel_of_modality, channels_of_words
from gateway.training_data.source_scan import SourceSeries


def _series(modality: str, description: str) -> SourceSeries:
    return SourceSeries(
        study_instance_uid="1",
        series_instance_uid="1.2",
        frames_of_reference=frozenset(),
        modality=modality,
        description=description,
        patient_id="",
        issuer="",
        patient_name="",
        files=(),
        instances=frozenset(),
    )


def test_a_channel_takes_what_modality_and_description_say() -> None:
    flair, ct, anything = channels_of_words(["FLAIR=mr:*flair*", "CT=CT", "any"])
    assert [c.name for c in (flair, ct, anything)] == ["FLAIR", "CT", "any"]
    assert flair.takes(_series("MR", "ax FLAIR fs"))
    assert not flair.takes(_series("MR", "ax T2"))
    assert not flair.takes(_series("CT", "flair"))
    assert ct.takes(_series("CT", ""))
    assert anything.takes(_series("OT", "x"))
    (by_description,) = channels_of_words(["T1=*:t1: ax"])
    assert by_description.takes(_series("MR", "T1: ax"))


@pytest.mark.parametrize("words", [["=CT"], ["a=b=c"], ["a=", "b"], ["CT", "CT"], ["CT=C T"]])
def test_a_channel_that_cannot_be_read_is_refused(words: list[str]) -> None:
    with pytest.raises(Rejected, match="--channel"):
        channels_of_words(words)


@pytest.mark.parametrize(("modality", "name"), [("CT", "CT"), ("MR", "MR"), ("PT", "PET"), ("", "image")])
def test_without_a_choice_the_modality_names_the_channel(modality: str, name: str) -> None:
    assert channel_of_modality([modality, modality]).name == name


def test_two_modalities_are_no_channel() -> None:
    with pytest.raises(Rejected, match=r"CT \(2\), MR \(1\)"):
        channel_of_modality(["CT", "MR", "CT"])
