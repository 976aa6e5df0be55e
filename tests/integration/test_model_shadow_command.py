"""`seggate models shadow` and `seggate models watch`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.commands import model_shadow, training_runs
from gateway.learning.registration import register
from gateway.learning.runs import WAITS
from gateway.settings import load_settings
from gateway.state import open_registry, prepare_state
from storage import ledger
from storage.alarms import open_alarms, raise_alarm
from storage.errors import ModelMissing
from storage.learning_records import RunState, ShadowRun
from storage.models import SHADOW
from storage.records import ResultState, StudyState, utc_now
from tests.support.intensity_model import PHANTOM_BANDS, SWAPPED_BANDS, write_intensity_bundle
from tests.support.live_studies import begin_period
from tests.support.story_rows import add_result, add_study, add_training, add_version

_LEARNING = '[[models]]\nname = "sides"\non_drift = "nothing"\n[models.change_plan]\nshadow_studies = 4\n'


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sides 1.0.0 as champion, and 2.0.0."""
    folder = tmp_path_factory.mktemp("shadow command")
    config = folder / "config"
    config.mkdir()
    (config / "gateway.toml").write_text('state_dir = "state"\n[receiver]\nreserve_mb = 16\n')
    (config / "learning.toml").write_text(_LEARNING)
    settings = load_settings(config)
    prepare_state(settings).close()
    for semver, bands in (("1.0.0", PHANTOM_BANDS), ("2.0.0", SWAPPED_BANDS)):
        bundle = write_intensity_bundle(folder / semver, name="sides", semver=semver, bands=bands)
        register(settings, bundle, candidate=semver == "2.0.0", actor="test")
    return config


def watched(config: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert model_shadow.watch(config, "sides", as_json=True) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.requirement("ART-23")
def test_a_version_is_put_in_shadow_shown_with_its_progress_and_taken_out(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watched(config, capsys)["shadow"] is None
    assert model_shadow.shadow(config, "sides", "2.0.0", as_json=False) == 0
    assert "2.0.0 runs in shadow until 4 studies are compared" in capsys.readouterr().err
    assert SHADOW in open_registry(load_settings(config)).get("sides", "2.0.0").aliases
    database = prepare_state(load_settings(config))
    with database.session() as session:
        add_study(session, StudyState.VERIFIED)
        add_version(session)
        result = add_result(session, ResultState.RELEASED, verdict="pass")
        run = {"model_name": "sides", "model_version": "2.0.0", "ordered_at": utc_now(), "attempts": 1}
        session.add(
            ShadowRun(
                result_id=result.result_id,
                workflow_id="s1",
                state="done",
                verdict="hold",
                dice={"left structure": 0.25},
                figures={"champion": {"verdict": "pass"}},
                **run,
            )
        )
    database.close()
    found = watched(config, capsys)["shadow"]
    assert isinstance(found, dict)
    assert (found["version"], found["done"], found["wanted"]) == ("2.0.0", 1, 4)
    assert found["dice"] == {"left structure": [0.25, 0.25]}
    assert model_shadow.watch(config, "sides", as_json=False) == 0
    said = capsys.readouterr().out
    assert "In shadow: 2.0.0, 1 of 4 studies compared" in said
    assert "QA judged otherwise (pass → hold): 1" in said
    for answer in ("2.0.0 runs in shadow no more", "no version of sides runs in shadow"):
        assert model_shadow.shadow(config, "sides", None, as_json=False) == 0
        assert answer in capsys.readouterr().err
    assert watched(config, capsys)["shadow"] is None


def test_what_cannot_run_in_shadow_is_refused_with_the_reason(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_shadow.shadow(config, "sides", "1.0.0", as_json=False) == 1
    assert "serves already" in capsys.readouterr().err
    with pytest.raises(ModelMissing):
        model_shadow.shadow(config, "sides", "9.0.0", as_json=False)
    assert model_shadow.watch(config, "nobody", as_json=False) == 1


@pytest.mark.requirement("ART-23")
def test_the_first_studies_of_a_new_champion_are_shown_with_rates_and_limits(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(config)
    database = prepare_state(settings)
    with database.session() as session:
        begin_period(session, open_registry(settings).get("sides", "1.0.0"), previous="0.9.0")
        add_study(session, StudyState.HELD, uid="1.2.9")
        add_version(session, uid="1.2.9")
        result = add_result(session, ResultState.HELD, result_id="held", uid="1.2.9", verdict="hold")
        result.model_name, result.checks = "sides", [{"name": "empty", "verdict": "hold"}]
    database.close()
    found = watched(config, capsys)
    assert (found["serves"], found["previous"], found["watched"]) == ("1.0.0", "0.9.0", True)
    assert found["watch"] == {
        "studies": 1,
        "wanted": 30,
        "least": 3,
        "rates": [
            {"what": "failed", "studies": 0, "limit": 0.2},
            {"what": "were held by QA", "studies": 1, "limit": 0.5},
            {"what": "have an empty label", "studies": 1, "limit": 0.3},
        ],
    }
    assert model_shadow.watch(config, "sides", as_json=False) == 0
    said = capsys.readouterr().out
    assert "watched; beyond a limit 0.9.0 serves again" in said
    assert "Studies: 1 of 30" in said


def test_a_training_that_is_stopped_takes_its_candidate_out_of_shadow_and_waits_for_nobody(config: Path) -> None:
    settings = load_settings(config)
    registry, database = open_registry(settings), prepare_state(settings)
    registry.set_shadow("sides", "2.0.0")
    with database.session() as session:
        add_training(session, RunState.CANDIDATE, model="sides").semver = "2.0.0"
        raise_alarm(session, kind=WAITS, subject="model:sides", message="...")
    assert training_runs.stop(config, "a", reason="the site has changed", as_json=False) == 0
    assert registry.shadow("sides") is None
    with database.reading() as session:
        assert list(open_alarms(session)) == []
        kinds = [event.kind for event in ledger.events(session, ledger.model_subject("sides"))]
    assert kinds[-2:] == ["training-refused", "shadow-stopped"]
    assert training_runs.stop(config, "a", reason="again", as_json=False) == 1
    database.close()
