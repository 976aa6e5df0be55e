"""Routing of stored studies: what is decided, kept and explained; and the routes file in use."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from sqlalchemy import select

from gateway.intake.attribute_values import InstanceFacts, SeriesHeaders
from gateway.intake.errors import IntakeRejected
from gateway.intake.routes_file import ALARM_BROKEN, ALARM_NO_MODEL, RoutesFile
from gateway.intake.routing import ALARM_REVIEW, SeriesDecision, Verdict, route, route_version
from gateway.intake.routing_explanation import explain, lines_of
from gateway.intake.routing_rules import RulesInvalid, parse_rules
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import (
    Instance,
    InstanceState,
    LedgerEvent,
    RoutingDecision,
    Series,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)
from storage.records import RuleSet as RuleSetRecord
from storage.spool import study_key

SHIPPED = Path(__file__).resolve().parents[2] / "config" / "routes.toml"
STUDY = "1.2.3"
NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
CT_RULE = (
    '[[rules]]\nname = "ct"\nmodel = "ct-liver"\nwhen.all = [{ attribute = "Modality", op = "equals", value = "CT" }]\n'
)
MR_RULE = CT_RULE.replace('"ct"', '"mr"').replace("ct-liver", "mr-brain").replace("CT", "MR")
THIN_RULE = (
    '[[rules]]\nname = "thin"\nmodel = "thin"\nwhen.all = [{ attribute = "SliceThickness", op = "range", max = 2 }]\n'
)


class Shelf:
    """A stored study version and the headers of its objects."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.headers: dict[str, Dataset | Exception] = {}

    def read(self, spool_path: str) -> Dataset:
        found = self.headers[spool_path]
        if isinstance(found, Exception):
            raise found
        return found

    def store(self, series: dict[str, list[Dataset | Exception]]) -> str:
        with self.database.session() as session:
            session.add(
                Study(
                    study_instance_uid=STUDY, study_key=study_key(STUDY), state=StudyState.WHOLE,
                    first_received_at=NOW, last_received_at=NOW, calling_ae="MR1", version=1,
                )
            )  # fmt: skip
            session.flush()
            object_ids = []
            for uid, headers in series.items():
                first = next((h for h in headers if isinstance(h, Dataset)), Dataset())
                session.add(
                    Series(
                        study_instance_uid=STUDY, series_instance_uid=uid, first_received_at=NOW,
                        last_received_at=NOW, modality=first.get("Modality"),
                        series_description=first.get("SeriesDescription"),
                    )
                )  # fmt: skip
                for found in headers:
                    object_id = f"{len(self.headers):032x}"
                    object_ids.append(object_id)
                    self.headers[object_id] = found
                    session.add(
                        Instance(
                            object_id=object_id, study_instance_uid=STUDY, series_instance_uid=uid,
                            sop_instance_uid=f"1.2.9.{len(object_ids)}", state=InstanceState.CURRENT, digest="0" * 64,
                            size_bytes=1, spool_path=object_id, received_at=NOW, association_id="a", calling_ae="MR1",
                            called_ae="SEGGATE", peer_address="192.0.2.1",
                        )
                    )  # fmt: skip
            session.add(
                StudyVersion(
                    version_id="v1", study_instance_uid=STUDY, number=1, content_digest="0" * 64, declared_at=NOW,
                    rule="operator", evidence={}, object_ids=object_ids, workflow_id="w1",
                )
            )  # fmt: skip
        return "v1"

    def study(self) -> Study:
        with self.database.reading() as session:
            return session.get_one(Study, STUDY)

    def routed_events(self) -> list[dict[str, Any]]:
        with self.database.reading() as session:
            return [e.detail for e in ledger.events(session, ledger.study_subject(STUDY)) if e.kind == "routed"]

    def alarms(self) -> list[str]:
        with self.database.reading() as session:
            return [a.kind for a in open_alarms(session)]


@pytest.fixture
def shelf(database: Database) -> Shelf:
    return Shelf(database)


def header(modality: str = "CT", **attributes: Any) -> Dataset:
    dataset = Dataset()
    dataset.Modality = modality
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


@pytest.mark.requirement("RTE-21", "RTE-23")
@pytest.mark.peer("shared-data")
def test_only_the_hippocampus_crop_of_study3_is_routed_and_the_others_have_a_reason(
    shelf: Shelf, shared_data: Path
) -> None:
    series: dict[str, list[Dataset | Exception]] = {}
    for path in sorted((shared_data / "dicom" / "mr-hippocampus" / "study3").rglob("*.dcm")):
        found = pydicom.dcmread(path, stop_before_pixels=True)
        series.setdefault(str(found.SeriesInstanceUID), []).append(found)
    names = {
        uid: str(members[0].SeriesDescription) for uid, members in series.items() if isinstance(members[0], Dataset)
    }
    assert len(names) == 5
    version_id = shelf.store(series)
    routed = route_version(shelf.database, shelf.read, version_id, parse_rules(SHIPPED.read_text(encoding="utf-8")))
    assert routed.outcome == "matched"
    assert [(names[d.series_instance_uid], d.model) for d in routed.decisions if d.matched] == [
        ("HippoCrop", "hippocampus-mr")
    ]
    assert shelf.study().state == StudyState.PROCESSING
    (event,) = shelf.routed_events()
    for one in event["series"]:
        name = names[one["series"]]
        if name != "HippoCrop":
            assert f"{name} (22 images)" in one["reasons"]["hippocampus"]
    with shelf.database.reading() as session:
        text = "\n".join(lines_of(explain(session, STUDY)))
    assert "rule hippocampus: matched -> hippocampus-mr" in text
    assert text.count("rule hippocampus: not-matched") == 4
    assert "no  SeriesDescription equals 'HippoCrop' (all images): T1post x22" in text
    assert "PGBM" not in text
    assert "Albus" not in text


@pytest.mark.requirement("RTE-21")
def test_past_decisions_keep_the_rule_set_and_every_rule(shelf: Shelf) -> None:
    shelf.store({"1.1": [header()], "1.2": [header("MR")]})
    rules = parse_rules(CT_RULE + MR_RULE)
    first = route_version(shelf.database, shelf.read, "v1", rules)
    with shelf.database.reading() as session:
        rows = session.scalars(select(RoutingDecision).order_by(RoutingDecision.decision_id)).all()
        assert [(r.series_instance_uid, r.rule, r.matched, r.model) for r in rows] == [
            ("1.1", "ct", True, "ct-liver"),
            ("1.1", "mr", False, "mr-brain"),
            ("1.2", "ct", False, "ct-liver"),
            ("1.2", "mr", True, "mr-brain"),
        ]
        version = session.get_one(StudyVersion, "v1")
        assert version.rule_set_digest == rules.digest
        assert session.get_one(RuleSetRecord, rules.digest).text == CT_RULE + MR_RULE
        (shown,) = explain(session, STUDY)
    assert shown.json["series"][0]["models"] == ["ct-liver"]
    assert shown.json["series"][1]["rules"][0]["explanation"]["reason"].endswith("found MR (1 image)")
    again = route_version(shelf.database, shelf.read, "v1", parse_rules(THIN_RULE))
    assert again == first
    assert len(shelf.routed_events()) == 1


@pytest.mark.requirement("RTE-23", open="retention of unmatched studies")
def test_a_study_that_no_rule_wants_is_unmatched_with_the_reasons(shelf: Shelf) -> None:
    shelf.store({"1.1": [header("US")]})
    assert route_version(shelf.database, shelf.read, "v1", parse_rules(CT_RULE)).outcome == "unmatched"
    assert shelf.study().state == StudyState.UNMATCHED
    (event,) = shelf.routed_events()
    assert "found US (1 image)" in event["series"][0]["reasons"]["ct"]
    assert shelf.alarms() == []


@pytest.mark.requirement("RTE-23")
def test_a_rule_that_cannot_be_judged_sends_the_study_to_review(shelf: Shelf) -> None:
    broken = header()
    broken.add_new("SliceThickness", "LO", "thick")
    shelf.store({"1.1": [broken]})
    routed = route_version(shelf.database, shelf.read, "v1", parse_rules(THIN_RULE))
    assert routed.outcome == "review"
    assert [d.verdict for d in routed.decisions] == [Verdict.ERROR]
    assert shelf.study().state == StudyState.FAILED
    assert "SliceThickness is not a number" in str(shelf.study().state_reason)
    assert shelf.alarms() == [ALARM_REVIEW]
    assert route_version(shelf.database, shelf.read, "v1", parse_rules(CT_RULE)) == routed
    with shelf.database.session() as session:
        session.get_one(Study, STUDY).state = StudyState.WHOLE  # what `seggate retry` does
    retried = route_version(shelf.database, shelf.read, "v1", parse_rules(CT_RULE))
    assert retried.outcome == "matched"
    assert shelf.study().state == StudyState.PROCESSING
    assert shelf.alarms() == []
    assert [e["outcome"] for e in shelf.routed_events()] == ["review", "matched"]


@pytest.mark.requirement("RTE-23")
def test_an_object_whose_header_cannot_be_read_is_an_error_and_a_match_elsewhere_runs(shelf: Shelf) -> None:
    shelf.store({"1.1": [header(), IntakeRejected("cut off")], "1.2": [header()]})
    routed = route_version(shelf.database, shelf.read, "v1", parse_rules(CT_RULE))
    assert [(d.series_instance_uid, d.verdict) for d in routed.decisions] == [
        ("1.1", Verdict.ERROR),
        ("1.2", Verdict.MATCHED),
    ]
    assert routed.outcome == "matched"
    assert shelf.alarms() == [ALARM_REVIEW]


def decided(text: str, *datasets: Dataset) -> list[tuple[str, Verdict]]:
    facts = InstanceFacts(calling_ae="MR1", called_ae="SEGGATE", peer_address="192.0.2.1", received_at=utc_now())
    series = SeriesHeaders(series_instance_uid="1.1", datasets=datasets, facts=(facts,) * len(datasets))
    decisions: tuple[SeriesDecision, ...] = route(parse_rules(text), [series])
    return [(d.rule, d.verdict) for d in decisions]


@pytest.mark.parametrize("modality", ["SEG", "SR", "PR", "RTSTRUCT"])
def test_results_are_never_routed(modality: str) -> None:
    everything = CT_RULE.replace('op = "equals", value = "CT"', 'op = "exists"')
    assert decided(everything, header(modality)) == [("ct", Verdict.NOT_AN_IMAGE)]


def test_stop_keeps_later_rules_from_being_asked() -> None:
    keep_out = CT_RULE.replace('"ct"', '"out"').replace('model = "ct-liver"', "stop = true")
    assert decided(keep_out + CT_RULE, header()) == [("out", Verdict.KEPT_OUT), ("ct", Verdict.STOPPED)]
    assert decided(keep_out + MR_RULE, header("MR")) == [("out", Verdict.NOT_MATCHED), ("mr", Verdict.MATCHED)]


@pytest.mark.requirement("RTE-23")
def test_a_stop_rule_that_cannot_be_judged_blocks_the_later_ones() -> None:
    broken = header()
    broken.add_new("SliceThickness", "LO", "thick")
    stop = THIN_RULE.replace('model = "thin"', "stop = true")
    assert decided(stop + CT_RULE, broken) == [("thin", Verdict.ERROR), ("ct", Verdict.BLOCKED)]


def test_two_rules_for_one_model_run_it_once() -> None:
    twice = CT_RULE + CT_RULE.replace('"ct"', '"ct2"')
    assert decided(twice, header()) == [("ct", Verdict.MATCHED), ("ct2", Verdict.ALREADY_ROUTED)]


def test_disabled_rules_are_not_asked() -> None:
    off = CT_RULE.replace("when.all", "enabled = false\nwhen.all")
    assert decided(off, header()) == [("ct", Verdict.DISABLED)]


def test_priority_is_part_of_the_explanation(shelf: Shelf) -> None:
    shelf.store({"1.1": [header()]})
    urgent = CT_RULE.replace("when.all", 'priority = "urgent"\nwhen.all')
    routed = route_version(shelf.database, shelf.read, "v1", parse_rules(urgent))
    assert routed.decisions[0].explanation["priority"] == "urgent"


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def routes(database: Database, tmp_path: Path) -> Callable[..., RoutesFile]:
    clock = Clock()

    def make(**options: Any) -> RoutesFile:
        return RoutesFile(tmp_path / "routes.toml", database, clock=clock, **{"serves": lambda _name: True, **options})

    return make


@pytest.mark.requirement("RTE-25", open="rollback with one command")
def test_a_changed_file_is_taken_and_a_broken_one_is_not(
    routes: Callable[..., RoutesFile], database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "routes.toml"
    path.write_text(CT_RULE)
    file = routes()
    first = file.current()
    assert file.current() is first
    path.write_text(CT_RULE + MR_RULE)
    second = file.current()
    assert [r.name for r in second.rules] == ["ct", "mr"]
    for broken in (CT_RULE + "[[rules]]\nname = 'x'\n", "\xff[[", ""):
        path.write_bytes(broken.encode("latin-1"))
        if broken:
            assert file.current().digest == second.digest
    with database.reading() as session:
        (alarm,) = open_alarms(session)
        assert alarm.kind == ALARM_BROKEN
        assert second.digest[:12] in alarm.message
    path.unlink()
    assert file.current().digest == second.digest
    path.write_text(MR_RULE)
    assert [r.name for r in file.current().rules] == ["mr"]
    with database.reading() as session:
        assert list(open_alarms(session)) == []
        kinds = session.scalars(select(LedgerEvent.kind).where(LedgerEvent.subject == "gateway")).all()
        assert list(kinds) == ["routes-loaded"] * 3


@pytest.mark.requirement("RTE-25", open="rollback with one command")
def test_at_start_up_a_broken_file_gives_way_to_the_last_good_one(
    routes: Callable[..., RoutesFile], database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "routes.toml"
    for text in (CT_RULE, MR_RULE, CT_RULE):
        path.write_text(text)
        routes().current()
    path.write_text("broken")
    assert [r.name for r in routes().current().rules] == ["ct"]


def test_without_any_good_file_the_faults_are_raised(routes: Callable[..., RoutesFile], tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(CT_RULE.replace("Modality", "Modalty"))
    with pytest.raises(RulesInvalid, match="did you mean Modality"):
        routes().current()


def test_a_route_to_a_model_that_does_not_serve_is_taken_and_alarmed_until_it_does(
    routes: Callable[..., RoutesFile], database: Database, tmp_path: Path
) -> None:
    (tmp_path / "routes.toml").write_text(CT_RULE + MR_RULE)
    serving = {"ct-liver"}
    file = routes(serves=serving.__contains__)

    def alarms() -> list[tuple[str, str, int]]:
        with database.reading() as session:
            return [(a.kind, a.message, a.count) for a in open_alarms(session)]

    for _ in range(30):  # more seconds than a file is left alone for
        assert [r.name for r in file.current().rules] == ["ct", "mr"]
    ((kind, message, count),) = alarms()
    assert (kind, count) == (ALARM_NO_MODEL, 1)
    assert "no version serves: mr-brain;" in message
    serving.add("mr-brain")
    for _ in range(12):
        file.current()
    assert alarms() == []


def test_a_disabled_rule_needs_no_model(routes: Callable[..., RoutesFile], database: Database, tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(CT_RULE.replace("[[rules]]", "[[rules]]\nenabled = false"))
    routes(serves=lambda _name: False).current()
    with database.reading() as session:
        assert list(open_alarms(session)) == []
