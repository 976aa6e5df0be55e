"""`seggate audit verify`: an event of the ledger that was changed or removed is found and named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.settings import load_settings
from gateway.state import prepare_state
from storage import ledger
from storage.database import Database
from tests.support.config_folder import write_config

STUDY, MODEL = ledger.study_subject("1.2.3"), ledger.model_subject("liver")


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[Path, Database]]:
    """A ledger with a study of three events and a model of one."""
    config = write_config(tmp_path)
    database = prepare_state(load_settings(config))
    with database.session() as session:
        for kind in ("received", "whole", "judged"):
            ledger.append(session, subject=STUDY, kind=kind, actor="worker", detail={"verdict": "hold"})
        ledger.append(session, subject=MODEL, kind="promoted", actor="user:one")
    yield config, database
    database.close()


def verify(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["audit", "verify", *words, "--config", str(config)])


def test_a_ledger_as_it_was_written_is_whole(kept: tuple[Path, Database]) -> None:
    ran = verify(kept[0], "--json")
    assert (ran.exit_code, json.loads(ran.stdout)) == (0, {"ok": True, "events": 4, "broken": {}})
    assert "3 events in whole chains" in verify(kept[0], STUDY).output


@pytest.mark.requirement("ART-22")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE ledger SET detail = '{\"verdict\": \"pass\"}' WHERE kind = 'judged'", "event 3 (judged) was changed"),
        ("UPDATE ledger SET actor = 'user:two' WHERE kind = 'whole'", "event 2 (whole) was changed"),
        ("DELETE FROM ledger WHERE kind = 'whole'", "event 2 is missing (found 3)"),
        ("UPDATE ledger SET sequence = 13 WHERE kind = 'judged'", "event 3 is missing (found 13)"),
    ],
)
def test_a_tampered_row_is_named_and_the_other_chains_are_still_checked(
    kept: tuple[Path, Database], change: str, said: str
) -> None:
    config, database = kept
    with database.session() as session:
        session.execute(text(change))
    ran = verify(config, "--json")
    found = json.loads(ran.stdout)
    assert (ran.exit_code, found["ok"], found["events"], list(found["broken"])) == (1, False, 1, [STUDY])
    assert said in found["broken"][STUDY]
    assert said in verify(config, STUDY).output
    assert verify(config, MODEL).exit_code == 0


def test_a_subject_that_the_ledger_does_not_know_is_said(kept: tuple[Path, Database]) -> None:
    ran = verify(kept[0], "study:9.9")
    assert ran.exit_code == 1
    assert "the ledger has no events of study:9.9" in ran.output
