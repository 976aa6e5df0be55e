"""`seggate delete` and `seggate keep`."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

import typer
from sqlalchemy import select

from gateway.commands.output import local, print_json, say, table
from gateway.commands.studies import find_study
from gateway.deletion.deletions import Deleted, Deletions, StudyStays
from gateway.deletion.legal_hold import hold_study, legal_holds, lift_hold
from gateway.durable import Enqueuer
from gateway.errors import Rejected
from gateway.settings import load_settings
from gateway.state import existing_database, open_spool
from storage import ledger
from storage.database import Database
from storage.deletion_records import DeletionState, StudyDeletion
from storage.records import LedgerEvent, Study
from storage.spool import study_key


def delete(config: Path, study: str, *, reason: str, force: bool, yes: bool, as_json: bool) -> int:
    """0 when the study is gone; 1 when it stays, with the reasons, or is not known; 2 where nobody could be asked."""
    settings = load_settings(config)
    database = existing_database(settings)
    uid = _named(database, study)
    if uid is None:
        return 1
    if not yes and not confirmed(f"Delete study {uid} for good, with everything that was made of it?"):
        return 2
    enqueuer = Enqueuer(database)
    try:
        deletions = Deletions(database=database, spool=open_spool(settings), enqueuer=enqueuer, settings=settings)
        deleted = deletions.delete(uid, by=f"user:{getpass.getuser()}", reason=reason, force=force)
    except StudyStays as error:
        if as_json:
            reasons = [vars(r) for r in error.reasons]
            print_json({"ok": False, "study_uid": uid, "with_force": error.with_force, "reasons": reasons})
        say(f"seggate: {error}")
        if error.with_force:
            say("seggate: --force deletes it all the same: what was not delivered then reaches nobody, for good")
        return 1
    except (Rejected, KeyError) as error:
        say(f"seggate: {error}" if isinstance(error, Rejected) else f"seggate: {uid} is not here any more")
        return 1
    finally:
        enqueuer.close()
    if as_json:
        print_json({"ok": True, "study_uid": uid, **vars(deleted)})
    else:
        _present(uid, deleted)
    return 0


def keep(config: Path, study: str | None, *, reason: str | None, lift: bool, as_json: bool) -> int:
    """0 when the hold is there, or lifted, or the holds were listed; 1 when not; 2 without a reason."""
    database = existing_database(load_settings(config))
    if study is None:
        return _list_holds(database, as_json=as_json)
    if not reason or not reason.strip():
        say("seggate: --reason is needed: the ledger keeps it")
        return 2
    by = f"user:{getpass.getuser()}"
    try:
        with database.session() as session:
            found = find_study(session, study)
            if found is None:
                return 1
            uid = found.study_instance_uid
            if lift:
                lift_hold(session, uid, by=by, reason=reason)
            else:
                hold_study(session, uid, by=by, reason=reason)
    except Rejected as error:
        say(f"seggate: {error}")
        return 1
    if as_json:
        print_json({"ok": True, "study_uid": uid, "legal_hold": not lift})
    else:
        say(f"{uid}: {'may be deleted again' if lift else 'under legal hold; nothing deletes it until it is lifted'}")
    return 0


def confirmed(question: str) -> bool:
    """Whether a person at the terminal says yes; without one, what to do."""
    if not sys.stdin.isatty():
        say("seggate: nobody can be asked here; give --yes")
        return False
    return typer.confirm(question, default=False, err=True)


def _named(database: Database, study: str) -> str | None:
    """The UID of a study that is here, or of one whose events alone are left; says so where there is neither."""
    with database.reading() as session:
        events = select(LedgerEvent.event_id).where(LedgerEvent.subject == ledger.study_subject(study)).limit(1)
        if session.get(Study, study) is None and session.scalars(events).first() is not None:
            return study
        gone = session.scalars(
            select(StudyDeletion)
            .where(StudyDeletion.study_key == study_key(study), StudyDeletion.state == DeletionState.DONE)
            .order_by(StudyDeletion.done_at.desc())
            .limit(1)
        ).first()
        if session.get(Study, study) is None and gone is not None:
            say(f"seggate: that study was deleted at {local(gone.done_at)} (deletion {gone.deletion_id})")
            return None
        found = find_study(session, study)
        return None if found is None else found.study_instance_uid


def _list_holds(database: Database, *, as_json: bool) -> int:
    with database.reading() as session:
        holds = legal_holds(session)
    if as_json:
        fields = ("study_instance_uid", "since", "by", "reason")
        print_json([{field: getattr(hold, field) for field in fields} for hold in holds])
    elif not holds:
        say("no legal holds")
    else:
        rows = [(hold.study_instance_uid, local(hold.since), hold.by, hold.reason) for hold in holds]
        table("", ("study", "since", "by", "reason"), rows, whole=("study",))
    return 0


def _present(uid: str, deleted: Deleted) -> None:
    say(
        f"{uid}: deleted ({deleted.objects} objects, {deleted.results} results); the ledger keeps deletion "
        f"{deleted.deletion_id} and no name. What was delivered is where it was delivered to, and copies in backups "
        "are still there"
    )
    for copy in deleted.copies:
        say(f"a training's dataset still has a case of it: {copy}; see docs/deletion.md")
