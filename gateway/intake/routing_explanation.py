"""Why a past study was routed as it was: rule by rule, with the values that decided (RTE-21)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.records import RoutingDecision, Series, StudyVersion

_MARK = {"true": "yes", "false": "no ", "error": "?? "}


@dataclass(frozen=True, kw_only=True)
class VersionExplanation:
    """The routing of one version of a study: `lines` for people, `json` for scripts."""

    version: int
    rule_set_digest: str | None
    lines: tuple[str, ...]
    json: dict[str, Any]


def explain(session: Session, study_instance_uid: str) -> list[VersionExplanation]:
    """Every version of a study, oldest first; empty for a study that was never declared whole."""
    versions = session.scalars(
        select(StudyVersion).where(StudyVersion.study_instance_uid == study_instance_uid).order_by(StudyVersion.number)
    ).all()
    descriptions = {
        s.series_instance_uid: (s.modality, s.series_description)
        for s in session.scalars(select(Series).where(Series.study_instance_uid == study_instance_uid))
    }
    return [_explain_version(session, version, descriptions) for version in versions]


def _explain_version(
    session: Session, version: StudyVersion, descriptions: dict[str, tuple[str | None, str | None]]
) -> VersionExplanation:
    rows = session.scalars(
        select(RoutingDecision)
        .where(RoutingDecision.version_id == version.version_id)
        .order_by(RoutingDecision.decision_id)
    ).all()
    routed = f"rule set {(version.rule_set_digest or '')[:12]}" if version.routed_at else "not yet routed"
    lines = [f"version {version.number}: {routed}"]
    series: list[dict[str, Any]] = []
    for uid in dict.fromkeys(row.series_instance_uid for row in rows):
        mine = [row for row in rows if row.series_instance_uid == uid]
        modality, description = descriptions.get(uid, (None, None))
        lines.append(f"  series {uid} ({modality or 'no modality'}, {_printable(description) or 'no description'})")
        for row in mine:
            lines.extend(_rule_lines(row))
        series.append(
            {
                "series_instance_uid": uid,
                "modality": modality,
                "series_description": description,
                "models": [row.model for row in mine if row.matched],
                "rules": [
                    {"rule": row.rule, "matched": row.matched, "model": row.model, "explanation": row.explanation}
                    for row in mine
                ],
            }
        )
    return VersionExplanation(
        version=version.number,
        rule_set_digest=version.rule_set_digest,
        lines=tuple(lines),
        json={
            "version": version.number,
            "rule_set_digest": version.rule_set_digest,
            "routed_at": version.routed_at.isoformat() if version.routed_at else None,
            "series": series,
        },
    )


def _rule_lines(row: RoutingDecision) -> list[str]:
    explanation = row.explanation
    verdict = explanation.get("verdict", "matched" if row.matched else "not-matched")
    target = f" -> {row.model}" if row.matched else ""
    lines = [f"    rule {row.rule}: {verdict}{target}"]
    if "when" in explanation:
        lines.extend(_node_lines(explanation["when"], 6))
    elif explanation.get("reason"):
        lines.append(f"      {explanation['reason']}")
    return lines


def _node_lines(node: dict[str, Any], indent: int) -> list[str]:
    margin = " " * indent
    if "members" in node:
        lines = [f"{margin}{_MARK[node['truth']]} {node['group']} of:"]
        for member in node["members"]:
            lines.extend(_node_lines(member, indent + 2))
        return lines
    return [f"{margin}{_MARK[node['truth']]} {node['condition']}: {_found(node)}"]


def _found(leaf: dict[str, Any]) -> str:
    parts = [f"{v['value']} x{v['count']}" for v in leaf["values"]]
    if "absent" in leaf:
        parts.append(f"absent x{leaf['absent']}")
    if "error" in leaf:
        parts.append(f"error: {leaf['error']}")
    return ", ".join(parts) or "nothing"


def _printable(text: str | None) -> str:
    return "".join(c for c in text or "" if c.isprintable())


def lines_of(explanations: Sequence[VersionExplanation]) -> list[str]:
    """All lines of all versions, as `seggate show` prints them."""
    return [line for explanation in explanations for line in explanation.lines]
