"""gateway.deletion.deletions: what goes and what stays, that it is whole whoever dies, and who may ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select

from gateway.deletion.deletions import Deletions, StudyStays
from gateway.deletion.legal_hold import hold_study, lift_hold
from gateway.deletion.reasons_to_stay import judge_studies
from gateway.errors import Rejected
from gateway.monitoring.drift_window import served_versions
from gateway.monitoring.study_rows import recorded_studies, study_rows
from gateway.settings import GatewaySettings, ReceiverSettings, Settings
from storage import ledger
from storage.database import Database
from storage.deletion_records import DeletionState, StudyDeletion
from storage.learning_records import Correction, LearningRun, ReviewTask, RunState
from storage.records import LedgerEvent, Result, ResultState, Study, StudyState, utc_now
from storage.spool import Spool, study_key
from tests.support.config_folder import settings_in
from tests.support.finished_study import ACCESSION, NAME, PATIENT, UID, add_finished, everything_in, files_in
from tests.support.story_rows import NotedQueue

OTHER = "1.2.3.5"
BOUNDARIES = (
    *("decided", "workflows forgotten", "rows going", "folder aside", "before commit", "rows gone", "files gone"),
)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "state" / "spool", reserve_bytes=0)
    spool.prepare()
    return spool


def deletions(database: Database, spool: Spool, folder: Path, **how: object) -> Deletions:
    return Deletions(
        database=database,
        spool=spool,
        enqueuer=NotedQueue(),
        settings=settings_in(folder),
        **how,  # type: ignore[arg-type]
    )


def retire(made: Deletions, database: Database, uid: str = UID) -> None:
    policy = made._settings.gateway.retention
    with database.reading() as session:
        (study,) = judge_studies(session, policy, now=utc_now(), late_window_s=0, only=uid)
    made.retire(study, reason="less than 5 MB were free", in_shadow=())


def begin(made: Deletions, database: Database, why: str) -> None:
    if why == "request":
        made.delete(UID, by="user:ann", reason="r")
    else:
        retire(made, database)


def tombstones(database: Database) -> list[dict[str, object]]:
    with database.reading() as session:
        return [dict(event.detail) for event in ledger.events(session, ledger.DELETIONS)]


def is_whole(database: Database) -> bool:
    with database.reading() as session:
        return ledger.verify(session) == session.scalar(select(func.count()).select_from(LedgerEvent))


@pytest.mark.requirement("OPS-57")
def test_on_request_nothing_that_names_the_study_is_left_anywhere(
    database: Database, spool: Spool, tmp_path: Path
) -> None:
    add_finished(database, spool, OTHER)
    others, other_files = everything_in(database), files_in(spool.root)
    result_id = add_finished(database, spool)
    deleted = deletions(database, spool, tmp_path).delete(UID, by="user:ann", reason="asked for by its owner")
    assert (deleted.objects, deleted.results, deleted.in_spite_of) == (3, 1, ())
    left = everything_in(database).splitlines()
    # The ids of results stay for two days among what is swept, and go with it.
    named = [line for line in left if not line.startswith("study_deletions")]
    of_other = set(others.splitlines())
    for word in (f"{UID!r}", f"'{UID}.", f"study:{UID}", NAME, PATIENT, ACCESSION, result_id):
        assert [line for line in named if word in line and line not in of_other] == []
    assert of_other <= set(left)
    assert files_in(spool.root) == other_files
    assert is_whole(database)
    (tombstone,) = tombstones(database)
    assert tombstone["reason"] == "asked for by its owner"
    assert tombstone["objects"] == 3
    assert tombstone["erased"]["events"] == 6  # type: ignore[index]
    assert UID not in str(tombstone)


@pytest.mark.requirement("OPS-57")
def test_the_row_of_a_deletion_forgets_the_results_when_no_step_can_write_any_more(
    database: Database, spool: Spool, tmp_path: Path
) -> None:
    result_id = add_finished(database, spool)
    made = deletions(database, spool, tmp_path)
    made.delete(UID, by="user:ann", reason="r")
    with database.session() as session:
        (row,) = session.scalars(select(StudyDeletion))
        assert (row.state, row.study_instance_uid, row.result_ids) == (DeletionState.DONE, None, [result_id])
        row.done_at = utc_now() - timedelta(days=3)
    made.finish_all()
    assert result_id not in everything_in(database)
    assert UID not in everything_in(database)


@pytest.mark.requirement("OPS-57")
def test_retention_leaves_the_events_and_what_drift_compares_and_nothing_with_a_name(
    database: Database, spool: Spool, tmp_path: Path
) -> None:
    result_id = add_finished(database, spool)
    with database.reading() as session:
        (before,) = recorded_studies(session, "tiny", "1.0.0")
        facts = study_rows(session, [before.result_id])[result_id]
    retire(deletions(database, spool, tmp_path), database)
    with database.reading() as session:
        assert session.get(Study, UID) is None
        kinds = [event.kind for event in ledger.events(session, ledger.study_subject(UID))]
        (after,) = recorded_studies(session, "tiny", "1.0.0")
        assert served_versions(session) == [("tiny", "1.0.0")]
        assert (after.recorded_at, after.scanner) == (before.recorded_at, before.scanner)
        assert study_rows(session, [after.result_id]) == {after.result_id: facts}
        (task,) = session.scalars(select(ReviewTask))
        assert task.result_ids == ["another"]
    assert kinds[-1] == "study-removed"
    assert "released" in kinds
    tables = [line for line in everything_in(database).splitlines() if not line.startswith("ledger")]
    for word in (NAME, PATIENT, ACCESSION):
        assert [line for line in tables if word in line] == []
    assert files_in(spool.root) == []
    assert is_whole(database)
    assert tombstones(database)[0]["why"] == "retention"


def test_what_retention_left_goes_on_request(database: Database, spool: Spool, tmp_path: Path) -> None:
    add_finished(database, spool)
    made = deletions(database, spool, tmp_path)
    retire(made, database)
    made.delete(UID, by="user:ann", reason="asked for by its owner")
    assert f"study:{UID}" not in everything_in(database)
    assert [one["why"] for one in tombstones(database)] == ["retention", "request"]
    assert is_whole(database)
    with pytest.raises(KeyError):
        made.delete(UID, by="user:ann", reason="once more")


# -- whoever dies --------------------------------------------------------------------------------------------------


class Died(Exception):
    pass


@pytest.mark.requirement("OPS-57")
@pytest.mark.parametrize("point", BOUNDARIES)
@pytest.mark.parametrize("why", ["request", "retention"])
def test_a_deletion_that_is_cut_short_never_looks_whole_and_is_finished_by_the_next(
    database: Database, spool: Spool, tmp_path: Path, point: str, why: str
) -> None:
    add_finished(database, spool)

    def dies(name: str) -> None:
        if name == point:
            raise Died

    dying = deletions(database, spool, tmp_path, boundary=dies)
    with pytest.raises(Died):
        begin(dying, database, why)
    with database.reading() as session:
        study = session.get(Study, UID)
    assert study is None or study.state == StudyState.DELETING
    made = deletions(database, spool, tmp_path)
    made.finish_all()
    made.finish_all()
    _assert_gone(database, spool, why)


def _assert_gone(database: Database, spool: Spool, why: str) -> None:
    with database.reading() as session:
        assert session.get(Study, UID) is None
        (row,) = session.scalars(select(StudyDeletion))
        assert (row.state, row.objects) == (DeletionState.DONE, 3)
        has_chain = bool(ledger.events(session, ledger.study_subject(UID)))
    assert has_chain is (why == "retention")
    assert files_in(spool.root) == []
    assert list((spool.root / "tmp").iterdir()) == []
    assert len(tombstones(database)) == 1
    assert is_whole(database)


KILLED = """
import os, signal, sys
from pathlib import Path
from gateway.deletion.deletions import Deletions
from gateway.settings import load_settings
from storage.database import Database
from storage.spool import Spool
from tests.support.story_rows import NotedQueue
url, root, config, *points = sys.argv[1:]

def delete(uid, point):
    def boundary(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)
    Deletions(
        database=Database(url), spool=Spool(Path(root), 0), enqueuer=NotedQueue(),
        settings=load_settings(Path(config)), boundary=boundary,
    ).delete(uid, by="user:ann", reason="r")

for number, point in enumerate(points):
    if (child := os.fork()) == 0:
        delete(f"1.2.9.{number}", point)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, point
"""


@pytest.mark.requirement("OPS-57", "REC-01")
def test_killed_at_each_boundary_the_study_is_gone_once_and_whole(
    database: Database, spool: Spool, tmp_path: Path
) -> None:
    made = deletions(database, spool, tmp_path)
    uids = [f"1.2.9.{number}" for number in range(len(BOUNDARIES))]
    for uid in uids:
        add_finished(database, spool, uid)
    url = database.url.render_as_string(hide_password=False)
    words = [url, str(spool.root), str(tmp_path / "config"), *BOUNDARIES]
    subprocess.run([sys.executable, "-c", KILLED, *words], env={**os.environ}, check=True, timeout=120)
    with database.reading() as session:
        assert set(session.scalars(select(Study.state))) == {StudyState.DELETING}
    made.finish_all()
    with database.reading() as session:
        assert session.scalars(select(Study)).all() == []
    assert files_in(spool.root) == []
    assert len(tombstones(database)) == len(BOUNDARIES)
    assert is_whole(database)


def test_a_second_request_takes_part_in_the_first(database: Database, spool: Spool, tmp_path: Path) -> None:
    add_finished(database, spool)

    def dies(name: str) -> None:
        if name == "decided":
            raise Died

    with pytest.raises(Died):
        deletions(database, spool, tmp_path, boundary=dies).delete(UID, by="user:ann", reason="r")
    assert deletions(database, spool, tmp_path).delete(UID, by="user:bob", reason="r").objects == 3
    assert len(tombstones(database)) == 1


@pytest.mark.requirement("OPS-57")
def test_it_is_on_the_queue_of_the_workers_in_the_transaction_that_decides_it(
    database: Database, spool: Spool, tmp_path: Path
) -> None:
    add_finished(database, spool)
    queue = NotedQueue()
    settings = settings_in(tmp_path)
    deleted = Deletions(database=database, spool=spool, enqueuer=queue, settings=settings).delete(
        UID, by="user:ann", reason="r"
    )
    (call,) = queue.calls
    assert (call["argument"], call["delay_s"]) == ("deletion", 60.0)
    assert call["workflow_id"] == f"deletion {deleted.deletion_id} finish"
    assert f"study {UID} 1" in queue.forgotten


def test_what_a_step_writes_after_the_rows_are_gone_goes_too(database: Database, spool: Spool, tmp_path: Path) -> None:
    result_id = add_finished(database, spool)
    made = deletions(database, spool, tmp_path)
    made.delete(UID, by="user:ann", reason="r")
    spool.store_result_file(study_key(UID), result_id, "labels.npz", b"late")
    spool.store_result_file(study_key(UID), "of-a-new-study", "labels.npz", b"new")
    made.finish_all()
    assert files_in(spool.root) == [f"studies/{study_key(UID)}/results/of-a-new-study/labels.npz"]


# -- who may ask ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("OPS-57")
@pytest.mark.parametrize(
    ("state", "result", "words"),
    [
        (StudyState.DELIVERING, ResultState.RELEASED, "not where they are to go"),
        (StudyState.HELD, ResultState.HELD, "a result is held"),
        (StudyState.QUARANTINED, ResultState.RELEASED, "it is quarantined"),
        (StudyState.FAILED, ResultState.FAILED, "parked"),
        (StudyState.PROCESSING, ResultState.PENDING, "a model is at work"),
        (StudyState.RECEIVING, ResultState.RELEASED, "still arrive"),
    ],
)
def test_what_is_not_done_with_needs_force(
    database: Database, spool: Spool, tmp_path: Path, state: StudyState, result: ResultState, words: str
) -> None:
    result_id = add_finished(database, spool, state=state)
    with database.session() as session:
        session.get_one(Result, result_id).state = result
    made = deletions(database, spool, tmp_path)
    before = files_in(spool.root)
    with pytest.raises(StudyStays, match=words) as refused:
        made.delete(UID, by="user:ann", reason="r")
    assert refused.value.with_force
    assert files_in(spool.root) == before
    deleted = made.delete(UID, by="user:ann", reason="r", force=True)
    assert "state" in deleted.in_spite_of
    assert "state" in tombstones(database)[0]["in_spite_of"]  # type: ignore[operator]
    assert files_in(spool.root) == []


@pytest.mark.requirement("OPS-57")
def test_nobody_deletes_what_is_under_legal_hold(database: Database, spool: Spool, tmp_path: Path) -> None:
    add_finished(database, spool)
    with database.session() as session:
        hold_study(session, UID, by="user:ann", reason="case 7")
    made = deletions(database, spool, tmp_path)
    with pytest.raises(StudyStays, match="legal hold by user:ann: case 7") as refused:
        made.delete(UID, by="user:bob", reason="r", force=True)
    assert not refused.value.with_force
    with pytest.raises(StudyStays):
        retire(made, database)
    with database.session() as session, pytest.raises(Rejected, match="held by user:ann already"):
        hold_study(session, UID, by="user:bob", reason="mine")
    with database.session() as session:
        lift_hold(session, UID, by="user:ann", reason="closed")
        kinds = [event.kind for event in ledger.events(session, ledger.study_subject(UID))]
    assert kinds[-2:] == ["legal-hold", "legal-hold-lifted"]
    assert made.delete(UID, by="user:bob", reason="r").objects == 3


def test_a_reason_is_needed_and_a_study_that_is_not_here_is_told(
    database: Database, spool: Spool, tmp_path: Path
) -> None:
    made = deletions(database, spool, tmp_path)
    with pytest.raises(Rejected, match="needs a reason"):
        made.delete(UID, by="user:ann", reason=" ")
    with pytest.raises(KeyError):
        made.delete(UID, by="user:ann", reason="r")


@pytest.mark.requirement("OPS-57")
def test_a_case_that_a_training_holds_is_named_to_whoever_deletes_it(
    database: Database, spool: Spool, tmp_path: Path
) -> None:
    result_id = add_finished(database, spool)
    with database.session() as session:
        session.add(
            Correction(
                result_id=result_id, model_name="tiny", kind="approved", by="x", recorded_at=utc_now(), learnt_by="run1"
            )
        )
        session.add(
            LearningRun(
                run_id="run1",
                model_name="tiny",
                kind="fine-tuning",
                base_version="1.0.0",
                requested_by="x",
                reason="r",
                state=RunState.PROMOTED,
                cases=[{"result_id": result_id, "case": "live_r"}],
                folder="learning/run1",
                requested_at=utc_now(),
                updated_at=utc_now(),
                workflow_id="learn-run1",
            )
        )
    made = deletions(database, spool, tmp_path)
    with pytest.raises(StudyStays, match="a training took it"):
        made.delete(UID, by="user:ann", reason="r")
    deleted = made.delete(UID, by="user:ann", reason="r", force=True)
    assert deleted.copies == (f"{made._settings.models_dir}/learning/run1: live_r",)
    assert tombstones(database)[0]["copies_in_datasets"] == 1


def test_the_settings_refuse_a_policy_that_comes_too_late(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not more than receiver\.reserve_mb"):
        GatewaySettings(receiver=ReceiverSettings(reserve_mb=500), retention={"start_below_mb": 400})  # type: ignore[arg-type]
    assert isinstance(settings_in(tmp_path), Settings)
