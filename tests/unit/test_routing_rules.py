"""The language of routes.toml: what is accepted, and how faults are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.intake.routing_rules import RulesInvalid, parse_rules

SHIPPED = Path(__file__).resolve().parents[2] / "config" / "routes.toml"
HEAD = '[[rules]]\nname = "r"\nmodel = "m"\n'


def faults(text: str) -> str:
    with pytest.raises(RulesInvalid) as caught:
        parse_rules(text)
    return str(caught.value)


def condition(text: str) -> str:
    return f"{HEAD}[rules.when]\nall = [\n  {{ {text} }},\n]\n"


def test_the_shipped_file_is_valid() -> None:
    rules = parse_rules(SHIPPED.read_text(encoding="utf-8"))
    assert [(r.name, r.model, r.enabled) for r in rules.rules] == [
        ("hippocampus", "hippocampus-mr", True),
        ("keep-out-test-objects", None, False),
    ]
    assert len(rules.digest) == 64


@pytest.mark.requirement("RTE-25")
@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SeriesDescripton", "did you mean SeriesDescription"),
        ("series_description", "did you mean SeriesDescription"),
        ("Series Description", "did you mean SeriesDescription"),
        ("CallingAeTitel", "did you mean CallingAETitle"),
        ("PatientsName", "did you mean PatientName"),
        ("Xyzzy", "keywords of the DICOM data dictionary"),
    ],
)
def test_unknown_attributes_are_refused_with_a_suggestion(name: str, suggestion: str) -> None:
    message = faults(condition(f'attribute = "{name}", op = "equals", value = "x"'))
    assert suggestion in message
    assert message.startswith("routes.toml:6: rule 'r', when.all[0]: ")


@pytest.mark.requirement("RTE-25")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('attribute = "Modality", op = "equal", value = "CT"', "unknown op 'equal'; did you mean 'equals'?"),
        ('attribute = "Modality", op = "equals", value = 3', "expected text in quotes"),
        ('attribute = "Modality", op = "equals"', "needs a value"),
        ('attribute = "Modality", op = "equals", value = ["CT"]', "use 'in' for several"),
        ('attribute = "Modality", op = "in", value = "CT"', "takes a list"),
        ('attribute = "Modality", op = "range", min = 1', "does not fit Modality (text)"),
        ('attribute = "Rows", op = "contains", value = "5"', "does not fit Rows (number)"),
        ('attribute = "Rows", op = "range"', "needs min, max or both"),
        ('attribute = "Rows", op = "range", min = 5, max = 4', "nothing could match"),
        ('attribute = "Rows", op = "range", min = true', "expected a number"),
        ('attribute = "Rows", op = "range", min = nan', "expected a number"),
        ('attribute = "Rows", op = "range", value = 5', "takes min and max"),
        ('attribute = "Rows", op = "exists", value = 5', "takes no value"),
        ('attribute = "StudyDate", op = "range", min = "yesterday"', "not a date"),
        ('attribute = "ReceivedTime", op = "range", min = "25:00"', "not a time of day"),
        ('attribute = "ReceivedWeekday", op = "equals", value = "mon"', "is not one of monday"),
        ('attribute = "SliceOrientation", op = "equals", value = "axail"', "did you mean 'axial'?"),
        ('attribute = "PeerAddress", op = "in-network", value = "10.0.0.300"', "neither an IP address nor a network"),
        ('attribute = "Modality", op = "equals", value = "CT", instances = "most"', "is not one of all, any, none"),
        ('attribute = "Modality", op = "equals", value = "CT", wen = 1', "unknown key 'wen'"),
        ('attribute = "NumberOfInstances", op = "range", min = 1, instances = "any"', "one value for the series"),
        ('attribute = "0019,100A", op = "exists"', "needs its creator"),
        ('attribute = "0018,xx0A:ACME", op = "exists"', "private groups are odd"),
        ('attribute = "0018,FFFF", op = "exists"', "not in the DICOM data dictionary"),
        ('attribute = "Modality.CodeValue", op = "exists"', "Modality is not a sequence"),
        ('attribute = "AnatomicRegionSequence", op = "exists"', "name what is inside"),
        ('attribute = "PixelData", op = "exists"', "which rules cannot test"),
        ('attribute = "Modality", vr = "CS", op = "exists"', "for private elements only"),
        ('op = "exists"', "expected text in quotes"),
    ],
)
def test_faulty_conditions_are_refused_with_what_is_expected(text: str, expected: str) -> None:
    message = faults(condition(text))
    assert expected in message
    assert message.startswith("routes.toml:")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rulez = 1\n", "unknown key 'rulez'; did you mean 'rules'?"),
        ('time_zone = "Mars/Olympus"\n', "not a zone"),
        ('[[rules]]\nname = "r"\nwhen.all = [{ attribute = "Modality", op = "exists" }]\n', "must say stop = true"),
        (HEAD, "needs a [rules.when] table"),
        (HEAD + "when.most = []\n", "unknown key 'most'"),
        (HEAD + "when.all = []\n", "1 to 200 conditions"),
        (
            HEAD + 'prioriti = "urgent"\nwhen.all = [{ attribute = "Modality", op = "exists" }]\n',
            "did you mean 'priority'?",
        ),
        (HEAD + 'enabled = "yes"\nwhen.all = [{ attribute = "Modality", op = "exists" }]\n', "expected true or false"),
        ('[[rules]]\nname = "A b"\n', "lower-case letters"),
        ("[[rules]\n", "not valid TOML"),
    ],
)
def test_faulty_files_are_refused(text: str, expected: str) -> None:
    assert expected in faults(text)


def test_all_faults_are_reported_at_once_with_their_lines() -> None:
    first = condition('attribute = "Modalty", op = "equals", value = "CT"')
    second = condition('attribute = "Row", op = "exists"').replace('"r"', '"r2"')
    lines = faults(first + second).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["routes.toml:6", "routes.toml:13"]


def test_two_rules_of_one_name_are_refused() -> None:
    one = condition('attribute = "Modality", op = "exists"')
    assert "already called 'r'" in faults(one + one)


@pytest.mark.requirement("RTE-25")
def test_deep_nesting_is_refused() -> None:
    inner = '{ attribute = "Modality", op = "exists" }'
    for _ in range(12):
        inner = f"{{ any = [{inner}] }}"
    assert "nested deeper" in faults(f"{HEAD}when.all = [{inner}]\n")


def test_groups_nest() -> None:
    text = f"""{HEAD}[rules.when]
all = [
  {{ any = [ {{ attribute = "Modality", op = "equals", value = "CT" }}, {{ attribute = "Rows", op = "exists" }} ] }},
]
none = [ {{ attribute = "BodyPartExamined", op = "equals", value = "HEAD" }} ]
"""
    when = parse_rules(text).rules[0].when
    assert when.kind == "all"
    assert [getattr(m, "kind", None) for m in when.members] == ["all", "none"]
