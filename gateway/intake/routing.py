"""Routing: which series of a study that is whole goes to which model, with the reason for every rule.

Every series is judged by every rule over all of its images, and every judgement is kept with the values that decided
(RTE-21, RTE-24). A rule that could not be judged is never taken for one that said no (RTE-23). The rules are not asked
about the gateway's own canaries, whose model is known (gateway/intake/canary_mark.py).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zoneinfo import ZoneInfo

from pydicom.dataset import Dataset
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from gateway.intake.attribute_values import Image, InstanceFacts, SeriesHeaders, ValueUnreadable, images
from gateway.intake.canary_mark import CanaryMark, canary_mark
from gateway.intake.conditions import Truth, evaluate
from gateway.intake.errors import IntakeRejected
from gateway.intake.header import PARSER_ERRORS
from gateway.intake.routing_rules import Rule, RuleSet
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.canary_records import CANARY_RULE
from storage.database import Database
from storage.records import Instance, RoutingDecision, Series, Study, StudyState, StudyVersion, utc_now
from storage.records import RuleSet as RuleSetRecord

HeaderReader = Callable[[str], Dataset]
"""Header without pixel data of the object at a path relative to the spool; raises IntakeRejected, StorageError."""

ALARM_REVIEW = "routing-review"

# What no model takes as input: results, reports, plans, presentation states. Named by Modality (PS3.3 C.7.3.1.1.1).
_NOT_IMAGES = frozenset(
    {"SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "REG", "DOC", "FID", "PLAN", "M3D", "ANN"}
)
_MAX_REASONS = 20


class Verdict(enum.StrEnum):
    """What one rule said about one series."""

    MATCHED = "matched"
    NOT_MATCHED = "not-matched"
    ERROR = "error"  # a value could not be read; a person has to look
    STOPPED = "stopped"  # an earlier rule with `stop` was true
    BLOCKED = "blocked"  # an earlier rule with `stop` could not be judged, so it may have been true
    ALREADY_ROUTED = "already-routed"  # true, but an earlier rule sent the series to the same model
    KEPT_OUT = "kept-out"  # true, and the rule has no model: nothing is to be done with the series
    DISABLED = "disabled"
    NOT_AN_IMAGE = "not-an-image"


@dataclass(frozen=True, kw_only=True)
class SeriesDecision:
    """One rule's judgement of one series; `explanation` is JSON and holds no value of a patient attribute."""

    series_instance_uid: str
    rule: str
    verdict: Verdict
    matched: bool
    model: str | None
    explanation: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The outcome for a study version: "matched", "unmatched" or "review" (no match, but not every rule was judged)."""

    outcome: str
    decisions: tuple[SeriesDecision, ...]


def route(ruleset: RuleSet, series: Sequence[SeriesHeaders]) -> tuple[SeriesDecision, ...]:
    """Judge every series by every rule, in the order of the file."""
    return tuple(decision for one in series for decision in _route_series(ruleset, one))


def outcome(decisions: Sequence[SeriesDecision]) -> str:
    """A match runs, whatever else could not be judged (that is alarmed); an error without a match is for a person."""
    verdicts = {d.verdict for d in decisions}
    if Verdict.MATCHED in verdicts:
        return "matched"
    return "review" if Verdict.ERROR in verdicts else "unmatched"


def _route_series(ruleset: RuleSet, series: SeriesHeaders) -> list[SeriesDecision]:
    zone = ZoneInfo(ruleset.time_zone)
    series = replace(series, facts=tuple(replace(f, received_at=f.received_at.astimezone(zone)) for f in series.facts))
    unreadable: str | None = None
    found: tuple[Image, ...] = ()
    not_image = None
    try:
        not_image = _not_an_image(series)
        found = images(series)
    except ValueUnreadable as error:
        unreadable = str(error)
    decisions: list[SeriesDecision] = []
    routed_to: dict[str, str] = {}
    stopped_by: tuple[Verdict, str] | None = None
    for rule in ruleset.rules:
        if not_image is not None:
            decision = _decision(series, rule, Verdict.NOT_AN_IMAGE, {"reason": not_image})
        elif not rule.enabled:
            decision = _decision(series, rule, Verdict.DISABLED, {"reason": "the rule is disabled"})
        elif stopped_by is not None:
            verdict, by = stopped_by
            what = "is true" if verdict is Verdict.STOPPED else "could not be judged"
            decision = _decision(series, rule, verdict, {"reason": f"not asked: rule {by!r} {what} and stops"})
        elif unreadable is not None:
            decision = _decision(series, rule, Verdict.ERROR, {"truth": "error", "reason": unreadable})
        else:
            decision = _judge(rule, series, found, routed_to)
        if rule.enabled and rule.stop and stopped_by is None:
            if decision.verdict in {Verdict.MATCHED, Verdict.KEPT_OUT, Verdict.ALREADY_ROUTED}:
                stopped_by = (Verdict.STOPPED, rule.name)
            elif decision.verdict is Verdict.ERROR:
                stopped_by = (Verdict.BLOCKED, rule.name)
        decisions.append(decision)
    return decisions


def _judge(rule: Rule, series: SeriesHeaders, found: Sequence[Image], routed_to: dict[str, str]) -> SeriesDecision:
    evaluated = evaluate(rule.when, series, found)
    detail: dict[str, Any] = {"truth": evaluated.truth.value, "when": evaluated.explanation}
    if evaluated.truth is Truth.ERROR:
        return _decision(series, rule, Verdict.ERROR, {**detail, "reason": _first(evaluated.explanation, "error")})
    if evaluated.truth is Truth.FALSE:
        return _decision(series, rule, Verdict.NOT_MATCHED, {**detail, "reason": _why_false(evaluated.explanation)})
    if rule.model is None:
        return _decision(series, rule, Verdict.KEPT_OUT, {**detail, "reason": "the rule keeps the series out"})
    if rule.model in routed_to:
        reason = f"rule {routed_to[rule.model]!r} already sends the series to {rule.model}"
        detail |= {"priority": rule.priority, "reason": reason}
        return _decision(series, rule, Verdict.ALREADY_ROUTED, detail)
    routed_to[rule.model] = rule.name
    return _decision(series, rule, Verdict.MATCHED, {**detail, "priority": rule.priority})


def _decision(series: SeriesHeaders, rule: Rule, verdict: Verdict, detail: dict[str, Any]) -> SeriesDecision:
    return SeriesDecision(
        series_instance_uid=series.series_instance_uid,
        rule=rule.name,
        verdict=verdict,
        matched=verdict is Verdict.MATCHED,
        model=rule.model,
        explanation={"verdict": verdict.value, **detail},
    )


def _not_an_image(series: SeriesHeaders) -> str | None:
    """The reason why a series cannot be a model's input whatever the rules say, or None."""
    try:
        modalities = {str(d.get("Modality", "")).strip() for d in series.datasets}
    except PARSER_ERRORS as error:
        raise ValueUnreadable(f"Modality cannot be read ({type(error).__name__})") from error
    found = sorted(modalities & _NOT_IMAGES)
    return f"Modality {', '.join(found)}: results and reports are never routed to a model" if found else None


def _leaves(node: dict[str, Any]) -> list[dict[str, Any]]:
    if "members" not in node:
        return [node]
    return [leaf for member in node["members"] for leaf in _leaves(member)]


def _first(node: dict[str, Any], key: str) -> str:
    return next((f"{leaf['condition']}: {leaf[key]}" for leaf in _leaves(node) if key in leaf), "")


def _why_false(node: dict[str, Any]) -> str:
    """The condition or group that made a group false, in words."""
    if "members" not in node:
        return f"{node['condition']} is {node['truth']}; {_values_text(node)}"
    if node["group"] == "all":
        guilty = [m for m in node["members"] if m["truth"] == "false"]
    elif node["group"] == "none":
        guilty = [m for m in node["members"] if m["truth"] == "true"]
    else:
        guilty = list(node["members"])
    reasons = [_why_false(m) if node["group"] != "none" else _why_true(m) for m in guilty[:_MAX_REASONS]]
    return " | ".join(reasons) if node["group"] == "any" else "; ".join(reasons)


def _why_true(node: dict[str, Any]) -> str:
    if "members" not in node:
        return f"{node['condition']} is true; {_values_text(node)}"
    return f"the excluded group {node['group']} of {len(node['members'])} is true"


def _values_text(leaf: dict[str, Any]) -> str:
    """`T1post (22 images), absent (1 image)`."""
    parts = [f"{v['value']} ({_count(v['count'])})" for v in leaf["values"]]
    if "absent" in leaf:
        parts.append(f"absent ({_count(leaf['absent'])})")
    if "error" in leaf:
        parts.append(leaf["error"])
    return "found " + (", ".join(parts) or "nothing")


def _count(number: int) -> str:
    return f"{number} image" if number == 1 else f"{number} images"


def route_version(
    database: Database,
    headers: HeaderReader,
    version_id: str,
    ruleset: RuleSet,
    *,
    again: bool = False,
    canary_ae: str | None = None,
) -> Routed:
    """Route a version of a study and keep the decisions; a repeated call returns what was decided the first time.

    A study that was put back to WHOLE (an operator's retry) is judged again by the rules of today: its former
    decisions give way, the ledger keeps both. `again` asks for that whatever the state. Raises what `headers` raises
    for missing files; an unreadable header is a decision "error".
    """
    with database.reading() as session:
        version = session.get_one(StudyVersion, version_id)
        if not again and _is_settled(session, version):
            return _stored(session, version_id)
        wanted = set(version.object_ids)
        instances = session.scalars(
            select(Instance).where(Instance.study_instance_uid == version.study_instance_uid)
        ).all()
        modalities = {
            s.series_instance_uid: s.modality
            for s in session.scalars(select(Series).where(Series.study_instance_uid == version.study_instance_uid))
        }
        used = [instance for instance in instances if instance.object_id in wanted]
        mark = canary_mark(session, version.study_instance_uid, used, canary_ae=canary_ae)
    by_series: dict[str, list[Instance]] = {}
    for instance in sorted(used, key=lambda i: i.object_id):
        by_series.setdefault(str(instance.series_instance_uid), []).append(instance)
    study_modalities = tuple(sorted({m for uid in by_series if (m := modalities.get(uid))}))
    decisions: list[SeriesDecision] = []
    for uid, members in sorted(by_series.items()):
        if mark is not None:
            decisions.append(_of_canary(uid, mark))
            continue
        decisions.extend(_route_stored(ruleset, headers, uid, members, study_modalities, len(by_series)))
    with database.session() as session:
        return _keep(session, version_id, ruleset, tuple(decisions), sorted(by_series), again=again)


def _of_canary(series_instance_uid: str, mark: CanaryMark) -> SeriesDecision:
    verdict = Verdict.NOT_MATCHED if mark.model is None else Verdict.MATCHED
    return SeriesDecision(
        series_instance_uid=series_instance_uid,
        rule=CANARY_RULE,
        verdict=verdict,
        matched=mark.model is not None,
        model=mark.model,
        explanation={"verdict": verdict.value, "priority": "routine", "reason": mark.reason},
    )


def _route_stored(
    ruleset: RuleSet,
    headers: HeaderReader,
    series_instance_uid: str,
    members: Sequence[Instance],
    modalities: tuple[str, ...],
    number_of_series: int,
) -> Sequence[SeriesDecision]:
    empty = SeriesHeaders(series_instance_uid=series_instance_uid, datasets=(), facts=())
    datasets: list[Dataset] = []
    for instance in members:
        try:
            datasets.append(headers(instance.spool_path))
        except IntakeRejected as error:
            reason = f"the header of object {instance.object_id} cannot be read: {error}"
            return [
                _decision(empty, rule, Verdict.ERROR, {"truth": "error", "reason": reason})
                if rule.enabled
                else _decision(empty, rule, Verdict.DISABLED, {"reason": "the rule is disabled"})
                for rule in ruleset.rules
            ]
    facts = tuple(
        InstanceFacts(
            calling_ae=i.calling_ae, called_ae=i.called_ae, peer_address=i.peer_address, received_at=i.received_at
        )
        for i in members
    )
    return route(
        ruleset,
        (
            SeriesHeaders(
                series_instance_uid=series_instance_uid,
                datasets=tuple(datasets),
                facts=facts,
                modalities_in_study=modalities,
                number_of_study_related_series=number_of_series,
            ),
        ),
    )


def _is_settled(session: Session, version: StudyVersion) -> bool:
    """Decisions and the study's new state are written together, so a routed study in WHOLE was put back by hand."""
    study = session.get_one(Study, version.study_instance_uid)
    put_back = study.version == version.number and study.state == StudyState.WHOLE
    return version.routed_at is not None and not put_back


def _stored(session: Session, version_id: str) -> Routed:
    rows = session.scalars(
        select(RoutingDecision).where(RoutingDecision.version_id == version_id).order_by(RoutingDecision.decision_id)
    )
    decisions = tuple(
        SeriesDecision(
            series_instance_uid=row.series_instance_uid,
            rule=row.rule,
            verdict=Verdict(row.explanation["verdict"]),
            matched=row.matched,
            model=row.model,
            explanation=row.explanation,
        )
        for row in rows
    )
    return Routed(outcome=outcome(decisions), decisions=decisions)


def _keep(
    session: Session,
    version_id: str,
    ruleset: RuleSet,
    decisions: tuple[SeriesDecision, ...],
    series: Sequence[str],
    *,
    again: bool,
) -> Routed:
    """Decisions, rule set, ledger event and the study's state, in the caller's transaction."""
    version = session.get_one(StudyVersion, version_id, with_for_update=True)
    if not again and _is_settled(session, version):
        return _stored(session, version_id)  # another run of the same step was faster
    keep_rule_set(session, ruleset)
    session.execute(delete(RoutingDecision).where(RoutingDecision.version_id == version_id))
    session.add_all(
        RoutingDecision(
            version_id=version_id,
            series_instance_uid=d.series_instance_uid,
            rule=d.rule,
            matched=d.matched,
            model=d.model,
            explanation=d.explanation,
        )
        for d in decisions
    )
    version.rule_set_digest, version.routed_at = ruleset.digest, utc_now()
    result = outcome(decisions)
    subject = ledger.study_subject(version.study_instance_uid)
    errors = [d for d in decisions if d.verdict is Verdict.ERROR]
    ledger.append(
        session,
        subject=subject,
        kind="routed",
        actor="worker",
        detail={
            "version": version.number,
            "rule_set": ruleset.digest,
            "outcome": result,
            "series": [_series_summary(uid, [d for d in decisions if d.series_instance_uid == uid]) for uid in series],
        },
    )
    if errors:
        raise_alarm(
            session,
            kind=ALARM_REVIEW,
            subject=subject,
            message=f"rule {errors[0].rule!r} could not be judged for series {errors[0].series_instance_uid}: "
            f"{errors[0].explanation['reason']}",
        )
    else:
        clear_alarms(session, kind=ALARM_REVIEW, subject=subject, by="worker")
    study = session.get_one(Study, version.study_instance_uid)
    if study.version == version.number and study.state in {
        StudyState.WHOLE, StudyState.PROCESSING, StudyState.UNMATCHED, StudyState.FAILED
    }:  # fmt: skip
        study.state, study.state_reason = _study_state(result, decisions)
    return Routed(outcome=result, decisions=decisions)


def state_after_routing(session: Session, version: StudyVersion) -> tuple[StudyState, str | None]:
    """The state that routing gave the study of this version, and the reason."""
    if version.routed_at is None:
        return StudyState.WHOLE, None
    stored = _stored(session, version.version_id)
    return _study_state(stored.outcome, stored.decisions)


def _study_state(result: str, decisions: Sequence[SeriesDecision]) -> tuple[StudyState, str | None]:
    if result == "matched":
        return StudyState.PROCESSING, None
    if result == "review":
        error = next(d for d in decisions if d.verdict is Verdict.ERROR)
        return StudyState.FAILED, f"routing: rule {error.rule!r} could not be judged: {error.explanation['reason']}"
    if not decisions:
        return StudyState.UNMATCHED, "the routes file has no rules"
    return StudyState.UNMATCHED, "no rule wants any of its series; `seggate show` says why"


def _series_summary(uid: str, decisions: Sequence[SeriesDecision]) -> dict[str, Any]:
    return {
        "series": uid,
        "models": [{"model": d.model, "rule": d.rule} for d in decisions if d.matched],
        "reasons": {d.rule: d.explanation.get("reason", "") for d in decisions if not d.matched},
    }


def keep_rule_set(session: Session, ruleset: RuleSet) -> None:
    """Keep the text of a rule set that is used, once."""
    if session.get(RuleSetRecord, ruleset.digest) is None:
        session.add(RuleSetRecord(digest=ruleset.digest, loaded_at=utc_now(), text=ruleset.text))
        session.flush()
