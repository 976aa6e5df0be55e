"""Commands that look at the state: before the first start, where it cannot be used, and what they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.results.quality import Check, Verdict
from gateway.settings import load_settings
from gateway.state import prepare_state
from storage import ledger
from storage.database import Database
from storage.records import ResultState, Study, StudyState, utc_now
from tests.support.config_folder import write_config
from tests.support.story_rows import add_result, add_version

STUDY = "1.2.826.0.1.3680043.8.498.10010203040506070809010203040506070809"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and messages of `seggate …`."""

    def run(config: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["seggate", *arguments, "--config", str(config)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[Path, Database]]:
    """A configuration whose state has one open study."""
    config = write_config(tmp_path)
    database = prepare_state(load_settings(config))
    now = utc_now()
    with database.session() as session:
        session.add(
            Study(
                study_instance_uid=STUDY,
                study_key="key",
                state=StudyState.RECEIVING,
                state_reason="waits until nothing has arrived for a while, as the settings of its sender say",
                patient_name="Yamada^Tarou=山田^太郎",
                patient_id="PH-0001",
                calling_ae="CT1",
                version=0,
                first_received_at=now - timedelta(seconds=5),
                last_received_at=now,
            )
        )
        ledger.append(
            session, subject=ledger.study_subject(STUDY), kind="declared-whole", actor="worker", detail={"n": "x" * 500}
        )
    yield config, database
    database.close()


@pytest.mark.parametrize("command", ["studies", "show 1.2", "retry --all", "complete 1.2", "alarms", "models verify"])
def test_before_the_first_start_commands_say_so_and_make_no_database(tmp_path: Path, run: Run, command: str) -> None:
    (tmp_path / "state").mkdir()
    code, _, said = run(write_config(tmp_path), *command.split())
    path = tmp_path / "state" / "seggate.sqlite"
    assert (code, said) == (1, f"seggate: there is no database at {path} yet; `seggate serve` makes it\n")
    assert not path.exists()


def test_a_database_without_tables_is_one_that_no_gateway_has_used(tmp_path: Path, run: Run) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "seggate.sqlite").touch()
    code, _, said = run(write_config(tmp_path), "studies")
    assert (code, said) == (1, "seggate: the database has no tables yet; `seggate serve` makes them\n")


def test_before_the_first_import_there_are_no_models_and_none_is_made(tmp_path: Path, run: Run) -> None:
    code, _, said = run(write_config(tmp_path), "models", "list")
    assert code == 0
    assert "no models; import one" in said
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("key", ["state_dir", "models_dir"])
def test_serve_names_a_folder_that_it_cannot_make_and_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, key: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(f"SEGGATE_{key.upper()}", str(tmp_path / "file" / "x"))
    code, _, said = run(write_config(tmp_path), "serve")
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"seggate: {key}: {tmp_path / 'file' / 'x'} cannot be written by this user: Not a directory")


def test_a_file_that_cannot_be_reached_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setenv("SEGGATE_MODELS_DIR", "/proc/seggate")
    monkeypatch.setenv("SEGGATE_DATABASE__REGISTRY_URL", f"sqlite:///{tmp_path / 'registry.sqlite'}")
    code, _, said = run(write_config(tmp_path), "models", "list")
    assert (code, said) == (1, "seggate: /proc/seggate: No such file or directory\n")


@pytest.mark.parametrize("width", ["60", "100", "200"])
def test_a_study_uid_is_on_one_line_however_narrow_the_terminal(
    started: tuple[Path, Database], monkeypatch: pytest.MonkeyPatch, run: Run, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    _, out, _ = run(started[0], "studies")
    assert STUDY in out


def test_show_says_where_the_rest_of_long_evidence_is(started: tuple[Path, Database], run: Run) -> None:
    _, out, _ = run(started[0], "show", STUDY)
    assert "(--json has the rest)" in out
    _, out, _ = run(started[0], "show", STUDY, "--json")
    assert json.loads(out)["events"][0]["detail"] == {"n": "x" * 500}


@pytest.mark.requirement("ART-16")
def test_show_names_an_estimate_with_its_bound_and_limit(started: tuple[Path, Database], run: Run) -> None:
    check = Check(
        name="estimated-dice",
        segment="Anterior",
        value=0.87,
        limit="lower 90 % bound at least 0.7",
        verdict=Verdict.REVIEW,
        bound=0.66,
    )
    with started[1].session() as session:
        add_version(session, uid=STUDY)
        add_result(session, ResultState.RELEASED, uid=STUDY, verdict="review", checks=[check.to_json()])
    _, out, _ = run(started[0], "show", STUDY)
    assert "review: estimated-dice Anterior: 0.87, bound 0.66 (limit: lower 90 % bound at least 0.7)" in out
    _, out, _ = run(started[0], "show", STUDY, "--json")
    assert json.loads(out)["results"][0]["checks"][0]["bound"] == 0.66


@pytest.mark.parametrize(("option", "wish"), [((), "complete"), (("--wait",), "wait")])
def test_complete_prints_what_it_did_as_json(
    started: tuple[Path, Database], run: Run, option: tuple[str, ...], wish: str
) -> None:
    config, database = started
    code, out, _ = run(config, "complete", STUDY[:30], "--json", *option)
    assert (code, json.loads(out)) == (0, {"study_uid": STUDY, "wish": wish})
    with database.reading() as session:
        assert session.get_one(Study, STUDY).wish == wish


def test_config_show_names_the_files_and_the_variables_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    config = write_config(tmp_path)
    (config / "logging.toml").unlink()
    monkeypatch.setenv("SEGGATE_RECEIVER__PORT", "4243")
    _, out, _ = run(config, "config", "show", "--json")
    document = json.loads(out)
    assert document["files"] == {n: str(config / n) for n in ("gateway.toml", "destinations.toml", "routes.toml")}
    assert "SEGGATE_RECEIVER__PORT" in document["environment"]
    assert document["gateway"]["receiver"]["port"] == 4243
