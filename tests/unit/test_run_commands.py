"""The commands of a training run, and which trained folder they begin from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import Permanent
from gateway.learning.lineage import commands_of, trained_version
from gateway.learning.run_commands import RunCommands
from gateway.learning.runs import run_folder
from gateway.learning_settings import FineTuningSettings, ModelLearning, RetrainingSettings
from gateway.settings import Settings, load_settings
from storage.database import Database
from storage.learning_records import LearningRun, RunState
from storage.records import utc_now
from tests.support.config_folder import write_config

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    database.create_all()
    yield database
    database.close()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    model = tmp_path / "nnUNet_results" / "Dataset004_Liver" / NAME
    for fold in ("0", "3", "all", "unfinished"):
        (model / f"fold_{fold}").mkdir(parents=True)
        (model / f"fold_{fold}" / "checkpoint_final.pth").touch()
    (model / "fold_4").mkdir()
    (model / "plans.json").write_text('{"experiment_planner_used": "nnUNetPlannerResEncM"}')
    return model


def learning(trained: Path, **changes: object) -> ModelLearning:
    return ModelLearning(name="liver", trained=trained, dataset=trained.parent, **changes)  # type: ignore[arg-type]


def commands(folder: Path, trained: Path, kind: str = "fine-tuning", **changes: object) -> RunCommands:
    return RunCommands(
        folder=folder,
        kind=kind,
        trained=trained,
        old=trained.parent,
        old_preprocessed=None,
        learning=learning(trained, **changes),
        device="cpu",
    )


def test_the_folds_are_those_that_the_model_has(tmp_path: Path, trained: Path) -> None:
    assert commands(tmp_path, trained).folds() == ["0", "3", "all"]
    chosen = commands(tmp_path, trained, fine_tuning=FineTuningSettings(folds=("3",)))
    assert chosen.folds() == ["3"]


def test_a_model_without_a_finished_fold_is_nothing_to_begin_from(tmp_path: Path) -> None:
    model = tmp_path / "Dataset004_Liver" / NAME
    model.mkdir(parents=True)
    with pytest.raises(Permanent, match="nothing to begin from"):
        commands(tmp_path, model).folds()


def test_a_folder_with_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="TRAINER__PLANS__CONFIGURATION"):
        commands(tmp_path, tmp_path / "Dataset004_Liver")


def test_a_fine_tuning_says_the_articles_rule_to_the_command(tmp_path: Path, trained: Path) -> None:
    own = FineTuningSettings(epochs=4, iterations=9, rehearsal=0.5, budget_s=60, threads=1)
    words = commands(tmp_path, trained, fine_tuning=own).train("3")
    assert words[:3] == ["train", "fine-tune", str(trained)]
    pairs = dict(zip(words[3::2], words[4::2], strict=True))
    assert pairs["--fold"] == "3"
    assert (pairs["--epochs"], pairs["--iterations"], pairs["--rehearsal"]) == ("4", "9", "0.5")
    assert (pairs["--budget"], pairs["--threads"], pairs["--device"]) == ("60s", "1", "cpu")


def test_a_full_training_has_its_own_epochs_and_trainer(tmp_path: Path, trained: Path) -> None:
    made = commands(tmp_path, trained, "retraining", retraining=RetrainingSettings(profile="article", epochs=7))
    words = made.train("0")
    assert words[:3] == ["train", "run", str(made.raw)]
    assert words[words.index("--epochs") + 1] == "7"
    assert made.model_folder.name == "nnUNetTrainerArticle__nnUNetPlans__3d_fullres"
    plan = made.plan()
    assert plan[plan.index("--planner") + 1] == "ResEncM"
    assert made.select(["0"])[2:4] == ["--profile", "article"]


def test_plans_of_a_planner_that_is_not_here_are_refused(tmp_path: Path, trained: Path) -> None:
    (trained / "plans.json").write_text('{"experiment_planner_used": "MyPlanner"}')
    with pytest.raises(Permanent, match="'MyPlanner'"):
        commands(tmp_path, trained, "retraining").plan()


def test_every_word_of_every_command_is_one_that_the_command_line_knows(tmp_path: Path, trained: Path) -> None:
    from typer.main import get_command

    from gateway.cli import app

    both = [commands(tmp_path, trained, kind) for kind in ("fine-tuning", "retraining")]
    spoken = [words for c in both for words in (c.train("0"), c.select(["0"]), c.export(name="liver", semver="1.1.0"))]
    for words in [*spoken, both[1].plan()]:
        command, rest = get_command(app), list(words)
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


def _run(session_rows: Database, run_id: str, *, base: str, semver: str | None) -> None:
    with session_rows.session() as session:
        session.add(
            LearningRun(
                run_id=run_id,
                model_name="liver",
                kind="fine-tuning",
                base_version=base,
                semver=semver,
                requested_by="policy",
                reason="",
                state=RunState.PROMOTED,
                requested_at=utc_now(),
                updated_at=utc_now(),
                workflow_id=run_id,
            )
        )


def _settings(tmp_path: Path, trained: Path) -> Settings:
    config = write_config(tmp_path / "site")
    (config / "learning.toml").write_text(
        f'[[models]]\nname = "liver"\ntrained = "{trained}"\ndataset = "{trained.parent}"\n'
    )
    return load_settings(config)


def test_a_version_that_was_trained_here_is_followed_to_its_own_folder(
    database: Database, tmp_path: Path, trained: Path
) -> None:
    settings = _settings(tmp_path, trained)
    _run(database, "a" * 32, base="1.0.0", semver="1.1.0")
    own = run_folder(settings.models_dir, "a" * 32) / "results" / "Dataset004_Liver" / NAME
    with database.reading() as session:
        liver = settings.learning.of("liver")
        assert trained_version(session, settings, liver, "1.0.0").model == trained
        with pytest.raises(Permanent, match="is not there"):
            trained_version(session, settings, liver, "1.1.0")
        own.mkdir(parents=True)
        joined = own.parents[1] / "fine_tuning" / "raw" / "Dataset004_Liver"
        joined.mkdir(parents=True)
        found = trained_version(session, settings, liver, "1.1.0")
        assert (found.model, found.dataset) == (own, joined)
        # Or else the next training would forget what this one learnt.
        second = LearningRun(run_id="b" * 32, model_name="liver", kind="fine-tuning", base_version="1.1.0")
        words = commands_of(session, settings, second).train("0")
        assert words[words.index("--old") + 1] == str(joined)


def test_a_model_that_nobody_set_up_for_training_is_refused(database: Database, tmp_path: Path, trained: Path) -> None:
    settings = _settings(tmp_path, trained)
    with database.reading() as session, pytest.raises(Permanent, match="add `trained` and `dataset`"):
        trained_version(session, settings, settings.learning.of("other"), "1.0.0")
