"""`seggate studies`, `show`, `retry`, `withhold`, `release`, `complete`."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gateway.commands.output import console, local, print_json, printable, say, table
from gateway.settings import load_settings
from gateway.state import existing_database
from storage import ledger
from storage.canary_records import no_canary
from storage.database import Database
from storage.records import (
    Delivery,
    Instance,
    InstanceState,
    LedgerEvent,
    Result,
    ResultObject,
    Study,
    StudyState,
    StudyVersion,
)

if TYPE_CHECKING:
    from gateway.quarantine_release import Released
    from gateway.retrying import Retried

_ASIDE_SHOWN = 20


def studies(config: Path, *, state: str | None, limit: int, as_json: bool) -> int:
    """Newest first, without canaries. Names are shown on the screen and in --json because a person asked; they are in
    no log."""
    if state is not None and state not in set(StudyState):
        say(f"seggate: unknown state {state!r}; choose from {', '.join(StudyState)}")
        return 2
    database = existing_database(load_settings(config))
    with database.reading() as session:
        query = select(Study).where(no_canary(Study.study_instance_uid)).order_by(Study.last_received_at.desc())
        query = query.limit(limit)
        if state is not None:
            query = query.where(Study.state == state)
        rows = [_study_row(session, s) for s in session.scalars(query)]
    if as_json:
        print_json(rows)
    elif not rows:
        say("no studies")
    else:
        columns = ("study", "patient", "state", "objects", "version", "last object", "reason")
        table(
            "",
            columns,
            [
                (
                    r["study_uid"],
                    " ".join(filter(None, (r["patient_name"], f"[{r['patient_id']}]" if r["patient_id"] else ""))),
                    r["state"],
                    r["objects"],
                    r["version"],
                    local(r["last_received_at"]),
                    r["reason"],
                )
                for r in rows
            ],
            whole=("study",),
        )
    return 0


def show(config: Path, study: str, *, as_json: bool) -> int:
    """The ledger of one study, its results, deliveries and the routing rule by rule."""
    database = existing_database(load_settings(config))
    with database.reading() as session:
        found = find_study(session, study)
        if found is None:
            return 1
        document = study_document(session, found)
    if as_json:
        print_json(document)
    else:
        _print_study(document)
    return 0


def retry(config: Path, study: str | None, *, all_parked: bool, as_json: bool) -> int:
    """0 when something was put back on its queue (or nothing was parked with --all)."""
    from gateway.durable import Enqueuer
    from gateway.retrying import retriable_studies, retry_study

    if (study is None) == (not all_parked):
        say("seggate: name one study, or give --all")
        return 2
    settings = load_settings(config)
    database, destinations = existing_database(settings), settings.destinations
    if study is not None:
        with database.reading() as session:
            found = find_study(session, study)
            if found is None:
                return 1
            uids = [found.study_instance_uid]
    else:
        uids = retriable_studies(database)
    enqueuer = Enqueuer(database)
    actor = f"user:{getpass.getuser()}"
    try:
        retried = [retry_study(database, enqueuer, destinations, uid, actor=actor) for uid in uids]
    finally:
        enqueuer.close()
    if as_json:
        print_json([vars(r) for r in retried])
    elif not retried:
        say("nothing is parked")
    else:
        for r in retried:
            say(f"{r.study_instance_uid}: {_queued(r) if r.anything else _nothing_to_retry(database, r)}")
    return 0 if all_parked or any(r.anything for r in retried) else 1


def release(config: Path, study: str, *, reason: str, as_json: bool) -> int:
    """0 when the study is out of quarantine; 1 where it was not in it, with its state and who released it before."""
    from gateway.durable import Enqueuer
    from gateway.errors import Rejected
    from gateway.quarantine_release import release_quarantine

    database = existing_database(load_settings(config))
    with database.reading() as session:
        found = find_study(session, study)
        if found is None:
            return 1
        uid = found.study_instance_uid
    enqueuer = Enqueuer(database)
    try:
        released = release_quarantine(database, enqueuer, uid, reason=reason, actor=f"user:{getpass.getuser()}")
    except Rejected as error:
        say(f"seggate: {error}")
        return 1
    finally:
        enqueuer.close()
    if as_json:
        print_json(vars(released))
    else:
        say(
            f"{uid}: out of quarantine, now {released.state}; {_queued(released)}; "
            f"objects that stay aside: {released.objects_aside}"
        )
    return 0


def withhold(config: Path, destination: str, *, reason: str, study: str | None, as_json: bool) -> int:
    """0 when something was withheld; 1 where nothing is parked for the destination."""
    from gateway.withholding import withhold_parked

    database, uid = existing_database(load_settings(config)), None
    if study is not None:
        with database.reading() as session:
            found = find_study(session, study)
            if found is None:
                return 1
            uid = found.study_instance_uid
    actor = f"user:{getpass.getuser()}"
    withheld = withhold_parked(database, destination, reason=reason, actor=actor, study_instance_uid=uid)
    if as_json:
        print_json([vars(w) for w in withheld])
    elif not withheld:
        say(f"seggate: nothing is parked for {destination!r}")
    for w in withheld if not as_json else ():
        say(f"{w.study_instance_uid}: deliveries withheld: {w.deliveries}; its state is {w.state}")
    return 0 if withheld else 1


def complete(config: Path, study: str, *, wait: bool, as_json: bool) -> int:
    """Leave the operator's wish for the assembly, which acts at its next look; 1 when the study is not open."""
    from gateway.intake.operator_wish import set_wish

    database = existing_database(load_settings(config))
    wish = "wait" if wait else "complete"
    with database.session() as session:
        found = find_study(session, study)
        if found is None:
            return 1
        uid = found.study_instance_uid
        if not set_wish(session, uid, wish, actor=f"user:{getpass.getuser()}"):
            say(f"seggate: {uid} is not being received; its state is {found.state}")
            return 1
    if as_json:
        print_json({"study_uid": uid, "wish": wish})
    else:
        say(f"{uid}: {'stays open' if wait else 'will be declared whole'}")
    return 0


def _queued(done: Retried | Released) -> str:
    return f"back on the queue: {done.routing} routing, {done.results} results, {done.deliveries} deliveries"


def _nothing_to_retry(database: Database, retried: Retried) -> str:
    with database.reading() as session:
        study = session.get_one(Study, retried.study_instance_uid)
    if study.state == StudyState.QUARANTINED:
        return "it is quarantined; seggate release takes it out"
    why = f" ({study.state_reason})" if study.state_reason else ""
    return f"nothing is parked or unmatched; its state is {study.state}{why}"


def study_document(session: Session, study: Study) -> dict[str, Any]:
    """Everything known of a study, as `show --json` prints it."""
    from gateway.intake.routing_explanation import explain
    from gateway.quarantine import objects_aside

    results = session.scalars(
        select(Result).where(Result.study_instance_uid == study.study_instance_uid).order_by(Result.created_at)
    ).all()
    return {
        **_study_row(session, study),
        "events": [_event(e) for e in ledger.events(session, ledger.study_subject(study.study_instance_uid))],
        "versions": [
            {"number": v.number, "declared_at": v.declared_at, "rule": v.rule, "evidence": v.evidence}
            for v in session.scalars(
                select(StudyVersion)
                .where(StudyVersion.study_instance_uid == study.study_instance_uid)
                .order_by(StudyVersion.number)
            )
        ],
        "routing": [{"text": "\n".join(e.lines), **e.json} for e in explain(session, study.study_instance_uid)],
        "results": [_result(session, r) for r in results],
        "objects_aside": [_aside(i) for i in objects_aside(session, study.study_instance_uid)],
    }


def _study_row(session: Session, study: Study) -> dict[str, Any]:
    objects = session.scalar(
        select(func.count())
        .select_from(Instance)
        .where(Instance.study_instance_uid == study.study_instance_uid, Instance.state == InstanceState.CURRENT)
    )
    return {
        "study_uid": study.study_instance_uid,
        "state": study.state,
        "reason": study.state_reason,
        "patient_name": study.patient_name,
        "patient_id": study.patient_id,
        "accession_number": study.accession_number,
        "study_date": study.study_date,
        "description": study.study_description,
        "objects": objects,
        "version": study.version,
        "calling_ae": study.calling_ae,
        "first_received_at": study.first_received_at,
        "last_received_at": study.last_received_at,
    }


def _event(event: LedgerEvent) -> dict[str, Any]:
    return {"n": event.sequence, "at": event.at, "kind": event.kind, "actor": event.actor, "detail": event.detail}


def _result(session: Session, result: Result) -> dict[str, Any]:
    objects = session.scalars(select(ResultObject).where(ResultObject.result_id == result.result_id)).all()
    deliveries = session.scalars(select(Delivery).where(Delivery.result_id == result.result_id)).all()
    fields = (
        "result_id",
        "series_instance_uid",
        "part",
        "rule",
        "model_name",
        "model_version",
        "weights_digest",
        "state",
        "state_reason",
        "verdict",
        "checks",
        "measurements",
        "runtime",
        "created_at",
        "finished_at",
        "supersedes",
        "report_id",
    )
    object_fields = (
        "role",
        "encoding",
        "sop_instance_uid",
        "series_instance_uid",
        "spool_path",
        "size_bytes",
        "repairs",
    )
    delivery_fields = ("destination", "kind", "state", "state_reason", "attempts", "updated_at", "objects")
    return {
        **{f: getattr(result, f) for f in fields},
        "objects": [{f: getattr(o, f) for f in object_fields} for o in objects],
        "deliveries": [{f: getattr(d, f) for f in delivery_fields} for d in deliveries],
    }


def _aside(instance: Instance) -> dict[str, Any]:
    fields = (
        "object_id",
        "sop_instance_uid",
        "series_instance_uid",
        "state",
        "state_reason",
        "received_at",
        "calling_ae",
        "spool_path",
    )
    return {f: getattr(instance, f) for f in fields}


def find_study(session: Session, beginning: str) -> Study | None:
    """A study by its UID or the beginning of it; says what is wrong when it is none or more than one."""
    exact = session.get(Study, beginning)
    if exact is not None:
        return exact
    if not beginning or not all(c.isdigit() or c == "." for c in beginning):
        say(f"seggate: {beginning!r} is not the beginning of a UID")
        return None
    found = session.scalars(
        select(Study).where(Study.study_instance_uid.startswith(beginning, autoescape=True)).limit(3)
    ).all()
    if len(found) == 1:
        return found[0]
    say(f"seggate: {'no study' if not found else 'more than one study'} begins with {beginning}")
    return None


def _print_study(document: dict[str, Any]) -> None:
    out = console()
    out.print(f"study     {document['study_uid']}", markup=False)
    patient = printable(f"{document['patient_name'] or ''} [{document['patient_id'] or ''}]")
    out.print(f"patient   {patient}", markup=False)
    out.print(f"state     {document['state']}  {document['reason'] or ''}".rstrip(), markup=False)
    out.print(f"objects   {document['objects']}, version {document['version']}", markup=False)
    if document["state"] == StudyState.QUARANTINED:
        out.print("          seggate release takes it out of quarantine", markup=False)
    table(
        "\nLedger",
        ("time", "event", "by", "evidence"),
        [(local(e["at"]), e["kind"], e["actor"], _brief(e["detail"])) for e in document["events"]],
    )
    if document["routing"]:
        out.print("\nRouting", markup=False)
        for version in document["routing"]:
            out.print(version["text"], markup=False)
    if aside := document["objects_aside"]:
        out.print(f"\nKept aside, not used: {len(aside)} objects", markup=False)
        rows = [(local(o["received_at"]), o["sop_instance_uid"], o["state"], o["state_reason"]) for o in aside]
        table("", ("received", "SOP Instance UID", "state", "reason"), rows[:_ASIDE_SHOWN])
        if len(aside) > _ASIDE_SHOWN:
            out.print(f"… and {len(aside) - _ASIDE_SHOWN} more (--json has them all)", markup=False)
    for result in document["results"]:
        out.print(
            f"\nResult {result['result_id'][:12]}: {result['model_name']} {result['model_version']} on series "
            f"{result['series_instance_uid']} {result['part']}: {result['state']} {result['state_reason'] or ''}",
            markup=False,
        )
        if result["measurements"]:
            rows = [
                (m["name"], f"{m['volume_ml']:.2f}", m["voxels"], _number(m["confidence"]))
                for m in result["measurements"]
            ]
            table("", ("segment", "volume (ml)", "voxels", "confidence"), rows)
        for check in result["checks"] or []:
            if check["verdict"] != "pass":
                out.print(
                    f"  {check['verdict']}: {check['name']} {check['segment'] or ''}: {check['value']}"
                    f"{', bound ' + str(check['bound']) if 'bound' in check else ''} (limit: {check['limit']})",
                    markup=False,
                )
        if result["deliveries"]:
            deliveries = [
                (d["destination"], d["kind"], d["state"], d["attempts"], local(d["updated_at"]), d["state_reason"])
                for d in result["deliveries"]
            ]
            table("", ("destination", "by", "state", "attempts", "at", "reason"), deliveries)


def _brief(detail: dict[str, Any]) -> str:
    """Evidence on one or few lines: `key: value`, long values cut."""
    lines = []
    for key, value in detail.items():
        text = value if isinstance(value, str) else str(value)
        lines.append(f"{key}: {text if len(text) <= 160 else text[:140] + '… (--json has the rest)'}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
