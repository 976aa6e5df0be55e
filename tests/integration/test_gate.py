"""gateway.learning.gate: what a new version must pass, and what is written down of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from engine.bundle import Bundle, write_bundle
from engine.errors import BundleInvalid, DatasetInvalid, MemoryExceeded
from engine.evidence import Evidence, write_evidence
from engine.provenance import DataOrigin, Provenance, cases_digest
from engine.sanity_cases import SanityCase, SanitySuite, write_case
from engine.volume import Geometry, Volume
from gateway.learning.gate import check_at_startup, examine
from gateway.learning.gate_report import figure_rows, release_note
from gateway.learning_settings import ChangePlan, LearningSettings, ModelLearning
from gateway.settings import Settings
from storage import ledger
from storage.database import Database
from storage.errors import ModelMissing
from storage.learning_records import GateReport, LearningRun, RunState
from storage.models import ModelRegistry, RegisteredModel
from storage.records import utc_now
from tests.support.config_folder import settings_in
from tests.support.intensity_model import PHANTOM_BANDS, SWAPPED_BANDS, Band, write_intensity_bundle
from tests.support.locked_dataset import (
    BLIND_BANDS,
    DIM_BANDS,
    RIGHT_VOXELS,
    WIDE_AND_DIM_BANDS,
    WIDE_BANDS,
    write_locked,
)

NAME = "phantom"
PLAN = ChangePlan(least_locked_cases=3, max_runtime_ratio=1000)


@dataclass(frozen=True, kw_only=True)
class House:
    """A gateway's state with a registry, and a folder of locked cases."""

    root: Path
    settings: Settings
    database: Database
    registry: ModelRegistry

    def planned(self, plan: ChangePlan = PLAN, **learning: Any) -> House:
        """With this change plan in learning.toml; locked cases are those in `locked` if nothing else is said."""
        said = {"locked": self.root / "locked", **learning}
        entry = ModelLearning(name=NAME, on_drift="nothing", change_plan=plan, **said)
        return replace(self, settings=self.settings.model_copy(update={"learning": LearningSettings(models=(entry,))}))

    def register(
        self, semver: str, bands: Mapping[str, Band] = PHANTOM_BANDS, *, serve: bool = False, evidence: bool = True
    ) -> RegisteredModel:
        bundle = write_intensity_bundle(self.root / f"made-{semver}", name=NAME, bands=bands, semver=semver)
        return self.register_bundle(bundle, serve=serve, evidence=evidence)

    def register_bundle(self, bundle: Bundle, *, serve: bool = False, evidence: bool = True) -> RegisteredModel:
        model = self.registry.register(
            bundle.root,
            name=bundle.name,
            semver=bundle.semver,
            weights_digest=bundle.weights_digest,
            configuration_digest=bundle.configuration_digest,
            licence="",
            description="",
            serve=serve,
        )
        if evidence:
            with self.database.session() as session:
                detail = {
                    "semver": bundle.semver,
                    "weights_digest": bundle.weights_digest,
                    "evidence_digest": bundle.evidence_digest,
                }
                subject = ledger.model_subject(bundle.name)
                ledger.append(session, subject=subject, kind="model-imported", actor="test", detail=detail)
        return model

    def examine(self, semver: str = "1.1.0", **options: Any) -> GateReport:
        said = {"change": "fine-tuning", "requested_by": "user:ann", **options}
        return examine(self.database, self.registry, self.settings, NAME, semver, **said)

    def looks(self) -> list[dict[str, Any]]:
        """Details of the examinations in the ledger, whose chain holds."""
        with self.database.reading() as session:
            ledger.verify(session)
            events = ledger.events(session, ledger.model_subject(NAME))
            return [dict(event.detail) for event in events if event.kind == "model-examined"]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with an empty registry: MLflow takes seconds to make one."""
    folder = tmp_path_factory.mktemp("registry") / "models"
    assert ModelRegistry(folder).all() == []
    return folder


@pytest.fixture
def house(tmp_path: Path, registered: Path) -> Iterator[House]:
    """On SQLite."""
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield _house(tmp_path, database, registered)
    database.close()


def _house(folder: Path, database: Database, registered: Path) -> House:
    settings = settings_in(folder)
    shutil.copytree(registered, settings.models_dir)
    write_locked(folder / "locked", cases=4, bright=(0, 0, 0, 36))
    return House(
        root=folder, settings=settings, database=database, registry=ModelRegistry(settings.models_dir)
    ).planned()


def _checks(row: GateReport) -> list[str]:
    return [reason["check"] for reason in row.report["reasons"]]


@pytest.mark.requirement("ART-23", open="the rollback itself")
def test_a_version_as_good_as_the_one_that_serves_is_accepted(house: House) -> None:
    house.register("1.0.0", serve=True)
    candidate = house.register("1.1.0", WIDE_BANDS)
    shares: list[tuple[float, str]] = []
    row = house.examine(progress=lambda share, what: shares.append((share, what)))
    assert (row.verdict, row.champion_version, row.model_version) == ("ACCEPTED", "1.0.0", "1.1.0")
    assert (row.weights_digest, row.plan_digest) == (candidate.weights_digest, PLAN.digest)
    assert (row.change, row.requested_by) == ("fine-tuning", "user:ann")
    figures = row.report["figures"]
    assert figures["dice"]["candidate"] == figures["dice"]["champion"] == 1.0
    assert figures["backward_transfer"] == 0.0
    assert figures["runtime_ratio"] > 0
    assert figures["memory_ratio"] == pytest.approx(1.0, abs=0.01)
    assert (row.report["locked"]["cases"], row.report["locked"]["look"]) == (4, 1)
    assert [share for share, _ in shares] == sorted(share for share, _ in shares)
    assert {what for _, what in shares} >= {"files", "locked cases", "both versions", "done"}


@pytest.mark.requirement("ART-23")
def test_a_version_that_loses_is_rejected_with_every_figure_and_limit(house: House) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0", DIM_BANDS)
    row = house.examine()
    assert row.verdict == "REJECTED"
    kept = RIGHT_VOXELS - 36
    loss = (1 - 2 * kept / (kept + RIGHT_VOXELS)) / 4
    assert _checks(row) == ["dice"]
    assert row.report["reasons"][0]["figure"] == pytest.approx(loss / 2)
    assert row.report["reasons"][0]["limit"] == PLAN.max_dice_loss
    lenient = house.planned(ChangePlan(least_locked_cases=3, max_runtime_ratio=1000, max_dice_loss=0.05)).examine()
    assert lenient.verdict == "ACCEPTED"


@pytest.mark.parametrize(
    ("bands", "checks"),
    [
        (SWAPPED_BANDS, {"dice", "label-dice"}),
        (BLIND_BANDS, {"dice", "label-dice", "newly-empty"}),
    ],
)
def test_a_bad_version_is_rejected(house: House, bands: Mapping[str, Band], checks: set[str]) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0", bands)
    row = house.examine()
    assert row.verdict == "REJECTED"
    assert set(_checks(row)) == checks


@pytest.mark.requirement("ART-23")
def test_a_loss_in_one_stratum_is_found_where_the_mean_hides_it(house: House) -> None:
    strata = {"case_00": "site a", "case_01": "site a", "case_02": "site a", "case_03": "site b"}
    (house.root / "locked" / "strata.json").write_text(json.dumps(strata))
    house.register("1.0.0", serve=True)
    house.register("1.1.0", DIM_BANDS)
    plan = ChangePlan(least_locked_cases=3, max_runtime_ratio=1000, max_dice_loss=0.05)
    row = house.planned(plan).examine()
    assert (row.verdict, _checks(row)) == ("REJECTED", ["stratum-dice"])
    assert "stratum site b" in row.report["reasons"][0]["text"]
    assert row.report["locked"]["strata"] == {"site a": 3, "site b": 1}


@pytest.mark.requirement("ART-23")
def test_a_gain_on_new_cases_does_not_pay_for_a_loss_on_old_ones(house: House) -> None:
    old, new = house.root / "old", house.root / "new"
    write_locked(old, cases=4, bright=(12,))
    write_locked(new, cases=4, first=50, prefix="new", left=150)
    shutil.copytree(new / "imagesTr", old / "imagesTr", dirs_exist_ok=True)
    shutil.copytree(new / "labelsTr", old / "labelsTr", dirs_exist_ok=True)
    strata = {f"case_{i:02}": "site a" for i in range(4)} | {f"new_{i:02}": "new/site b" for i in range(4)}
    (old / "strata.json").write_text(json.dumps(strata))
    house = house.planned(locked=old)
    house.register("1.0.0", serve=True)
    house.register("1.1.0", WIDE_AND_DIM_BANDS)
    house.register("1.2.0", WIDE_BANDS)
    row = house.examine()
    figures = row.report["figures"]
    assert figures["dice"]["candidate"] > figures["dice"]["champion"] + 0.2
    assert figures["old_dice"]["cases"] == 4
    assert figures["backward_transfer"] == pytest.approx((2 * 204 / (204 + RIGHT_VOXELS) - 1) / 2)
    assert (row.verdict, _checks(row)) == ("REJECTED", ["backward-transfer"])
    assert house.examine("1.2.0").verdict == "ACCEPTED"


@pytest.mark.parametrize(
    ("plan", "learning", "options", "words"),
    [
        (PLAN, {}, {"change": "import"}, None),
        (ChangePlan(allowed=("retraining",), least_locked_cases=3), {}, {}, "does not allow fine-tuning"),
        (ChangePlan(allowed=(), least_locked_cases=3), {}, {}, "it allows nothing"),
        (ChangePlan(least_locked_cases=5), {}, {}, "4 locked cases; the change plan asks for 5"),
        (PLAN, {"locked": None}, {}, "names no `locked` cases"),
    ],
)
@pytest.mark.requirement("ART-23")
def test_what_the_plan_does_not_cover_is_outside_and_costs_no_look(
    house: House, plan: ChangePlan, learning: dict[str, Any], options: dict[str, Any], words: str | None
) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0", DIM_BANDS)
    row = house.planned(plan, **learning).examine(**options)
    if words is None:
        assert (row.verdict, row.report["locked"]["look"]) == ("REJECTED", 1)
        return
    assert row.verdict == "OUTSIDE_PLAN"
    assert words in row.report["reasons"][0]["text"]
    assert row.report["figures"] is None
    assert (row.report["locked"] or {}).get("look") is None


def test_other_labels_and_other_channels_are_outside_the_plan(house: House) -> None:
    house.register("1.0.0", serve=True)
    renamed = {"left structure": Band(low=200, high=500), "third": Band(low=500, high=800)}
    house.register("2.0.0", renamed)
    row = house.examine("2.0.0")
    assert (row.verdict, _checks(row)) == ("OUTSIDE_PLAN", ["labels", "locked-cases"])
    assert row.report["reasons"][0]["text"] == (
        "its labels are not those of 1.0.0, which serves: no change plan covers that"
    )
    assert "the locked cases have labels" in row.report["reasons"][1]["text"]
    assert any("--force --reason TEXT" in note for note in row.report["notes"])


@pytest.mark.requirement("ART-23")
def test_locked_cases_that_were_learnt_from_are_named(house: House) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0")
    trained = write_locked(house.root / "Dataset001_Trained", cases=3, first=200)
    kept = house.planned(trained=house.root, dataset=trained)
    assert kept.examine().verdict == "ACCEPTED"
    shutil.copy(
        house.root / "locked" / "imagesTr" / "case_02_0000.nii.gz", trained / "imagesTr" / "renamed_0000.nii.gz"
    )
    row = kept.examine()
    assert (row.verdict, _checks(row)) == ("OUTSIDE_PLAN", ["overlap"])
    assert row.report["reasons"][0]["text"] == "1 locked cases were learnt from: case_02"
    assert row.report["locked"]["overlap"] == ["case_02"]
    assert [look["look"] for look in house.looks()] == [1, None]


def test_cases_of_a_training_that_was_run_here_are_known_too(house: House) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0")
    run = house.settings.models_dir / "training" / "run-1"
    shutil.copytree(house.root / "locked", run / "raw" / "Dataset500_New")
    with house.database.session() as session:
        session.add(
            LearningRun(
                run_id="run-1",
                model_name=NAME,
                kind="fine-tuning",
                base_version="1.0.0",
                semver="1.1.0",
                requested_by="user:ann",
                reason="drift",
                state=RunState.TESTING,
                folder="training/run-1",
                requested_at=utc_now(),
                updated_at=utc_now(),
                workflow_id="w",
            )
        )
    row = house.examine()
    assert (row.verdict, _checks(row)) == ("OUTSIDE_PLAN", ["overlap"])
    assert len(row.report["locked"]["overlap"]) == 4
    shutil.rmtree(run / "raw")
    fold = run / "results" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "training.json").write_text(json.dumps({"train": ["case_01", "x"], "val": ["case_03"]}))
    assert house.examine().report["locked"]["overlap"] == ["case_01", "case_03"]
    (fold / "training.json").write_text("{")
    with pytest.raises(DatasetInvalid, match=r"fold_0/training\.json"):
        house.examine()


def test_a_bundle_that_says_that_it_learnt_from_these_cases_is_outside_the_plan(house: House) -> None:
    house.register("1.0.0", serve=True)
    names = [f"case_{index:02}" for index in range(4)]
    provenance = Provenance(
        data=DataOrigin(name="x", licence="", reference="", release="", cases=4, cases_digest=cases_digest(names)),
        training=(),
        exported_by="seggate 0.1.0",
    )
    bundle = write_intensity_bundle(house.root / "made-1.1.0", name=NAME, semver="1.1.0")
    house.register_bundle(_with_evidence(bundle, Evidence(provenance=provenance)))
    assert _checks(house.examine()) == ["overlap"]


@pytest.mark.requirement("ART-23")
def test_a_first_version_is_held_to_its_files_and_its_sanity_cases_alone(house: House) -> None:
    house.register("1.1.0", DIM_BANDS)
    row = house.planned(locked=None).examine()
    assert (row.verdict, row.champion_version, row.report["figures"]) == ("ACCEPTED", None, None)
    assert "no version serves yet: there is nothing to compare with" in row.report["notes"]
    row = house.examine()
    assert row.verdict == "ACCEPTED"
    assert row.report["figures"]["dice"]["candidate"] < 1
    assert row.report["figures"]["dice"]["champion"] is None
    few = house.planned(ChangePlan(least_locked_cases=100)).examine()
    assert few.verdict == "ACCEPTED"


def test_the_version_that_serves_is_compared_with_nothing(house: House) -> None:
    house.register("1.0.0", serve=True)
    row = house.examine("1.0.0")
    assert (row.verdict, row.champion_version) == ("ACCEPTED", None)
    assert "this version serves: there is nothing to compare with" in row.report["notes"]


@pytest.mark.requirement("ART-23")
def test_each_examination_is_written_down_and_each_look_counted(
    tmp_path: Path, database: Database, registered: Path
) -> None:
    house = _house(tmp_path, database, registered)
    house.register("1.0.0", serve=True)
    house.register("1.1.0", DIM_BANDS)
    rows = [house.examine(), house.examine(requested_by="user:bob"), house.planned(locked=None).examine()]
    assert [(look["report_id"], look["verdict"], look["look"]) for look in house.looks()] == [
        (rows[0].report_id, "REJECTED", 1),
        (rows[1].report_id, "REJECTED", 2),
        (rows[2].report_id, "OUTSIDE_PLAN", None),
    ]
    assert house.looks()[0]["locked_digest"] == rows[0].report["locked"]["digest"]
    assert house.looks()[1]["reasons"] == [reason["text"] for reason in rows[1].report["reasons"]]
    with house.database.reading() as session:
        assert [row.requested_by for row in session.scalars(select(GateReport).order_by(GateReport.report_id))] == [
            "user:ann",
            "user:bob",
            "user:ann",
        ]
    write_locked(tmp_path / "others", cases=4, first=70)
    others = house.planned(locked=tmp_path / "others").examine()
    assert others.report["locked"]["look"] == 1, "nobody has looked at these"


def _damage(folder: Path) -> None:
    file = folder / "3d_fullres" / "fold_0.onnx"
    file.write_bytes(file.read_bytes() + b"x")


def _replace(folder: Path) -> None:
    """Another whole bundle in its place."""
    shutil.rmtree(folder)
    write_intensity_bundle(folder, name=NAME, bands=DIM_BANDS, semver="1.1.0")


@pytest.mark.requirement("ART-23")
@pytest.mark.parametrize(
    ("edit", "words"),
    [(_damage, "the file was changed"), (_replace, "the weights are not those that were registered")],
)
def test_files_that_are_not_what_was_registered_are_rejected_and_not_run(house: House, edit: Any, words: str) -> None:
    house.register("1.0.0", serve=True)
    candidate = house.register("1.1.0")
    edit(candidate.folder)
    row = house.examine()
    assert row.verdict == "REJECTED"
    assert row.report["figures"] is None
    assert words in row.report["reasons"][0]["text"]
    assert words in check_at_startup(house.registry, house.settings, NAME, "1.1.0")[0]


def test_a_version_that_the_ledger_does_not_know_is_rejected(house: House) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0", evidence=False)
    row = house.examine()
    assert (row.verdict, _checks(row)) == ("REJECTED", ["integrity"])
    assert "the ledger has no registration" in row.report["reasons"][0]["text"]


def test_a_champion_that_is_damaged_gives_no_verdict(house: House) -> None:
    champion = house.register("1.0.0", serve=True)
    house.register("1.1.0")
    _damage(champion.folder)
    with pytest.raises(BundleInvalid):
        house.examine()
    assert house.looks() == []


def test_a_machine_that_is_too_small_gives_no_verdict(house: House) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0")
    worker = house.settings.gateway.worker.model_copy(update={"memory_budget_mb": 1})
    gateway = house.settings.gateway.model_copy(update={"worker": worker})
    small = replace(house, settings=house.settings.model_copy(update={"gateway": gateway}))
    with pytest.raises(MemoryExceeded):
        small.examine()
    assert house.looks() == []


def test_what_is_not_there_is_said(house: House) -> None:
    house.register("1.0.0", serve=True)
    with pytest.raises(ModelMissing):
        house.examine("9.9.9")
    house.register("1.1.0")
    with pytest.raises(DatasetInvalid):
        house.planned(locked=house.root / "nowhere").examine()


def _with_evidence(bundle: Bundle, evidence: Evidence) -> Bundle:
    write_evidence(bundle.root, evidence)
    return write_bundle(
        bundle.root,
        bundle,
        plans_json=json.loads((bundle.root / "plans.json").read_text()),
        dataset_json=json.loads((bundle.root / "dataset.json").read_text()),
    )


def _with_sanity(house: House, semver: str, *, is_right: bool) -> Bundle:
    """A bundle with a sanity case of its own, whose expected labels are what it gives, or are not."""
    bundle = write_intensity_bundle(house.root / f"made-{semver}", name=NAME, semver=semver)
    geometry = Geometry(shape=(16, 16, 16), affine_lps=np.diag([-2.0, -2.0, 2.0, 1.0]))
    array = np.full((1, 16, 16, 16), 50, dtype=np.float32)
    array[0, 4:9, 4:9, 4:9] = 350
    volume = Volume(array=array, geometry=geometry)
    labels = (array[0] > 200).astype(np.uint8)
    if not is_right:
        labels[0] = 2
    case = SanityCase(
        name="site-1",
        phantom=None,
        image_sha256=None,
        geometry=geometry,
        voxels={"left structure": int((labels == 1).sum()), "right structure": int((labels == 2).sum())},
        dice=None,
    )
    write_case(bundle.root, case, labels, image=volume, reference=None)
    return _with_evidence(bundle, Evidence(sanity=SanitySuite(computed_by="torch", cases=(case,))))


@pytest.mark.requirement("ART-23")
def test_a_version_that_does_not_give_its_own_sanity_cases_is_rejected_before_any_look(house: House) -> None:
    house.register("1.0.0", serve=True)
    house.register_bundle(_with_sanity(house, "1.1.0", is_right=False))
    house.register_bundle(_with_sanity(house, "1.2.0", is_right=True))
    row = house.examine()
    assert (row.verdict, set(_checks(row))) == ("REJECTED", {"sanity"})
    assert "sanity case site-1" in row.report["reasons"][0]["text"]
    assert row.report["figures"] is None
    assert row.report["sanity"][0]["changed"] == 256
    assert "sanity case site-1" in check_at_startup(house.registry, house.settings, NAME, "1.1.0")[0]
    good = house.examine("1.2.0")
    assert (good.verdict, good.report["sanity"][0]["faults"]) == ("ACCEPTED", [])
    assert check_at_startup(house.registry, house.settings, NAME, "1.2.0") == ()


def test_a_start_looks_at_no_locked_case(house: House) -> None:
    house.register("1.0.0", SWAPPED_BANDS, serve=True)
    assert check_at_startup(house.registry, house.settings, NAME, "1.0.0") == ()
    assert house.looks() == []


def test_a_release_note_says_verdict_reasons_figures_and_plan(house: House) -> None:
    house.register("1.0.0", serve=True)
    house.register("1.1.0", DIM_BANDS)
    row = house.examine()
    note = release_note(row.report, examined_at="2026-01-02 03:04:05")
    assert note.startswith("# phantom 1.1.0: REJECTED\n")
    for words in (
        "compared with 1.0.0, which serves",
        "4 locked cases of locked, look number 1",
        "mean Dice: 0.9886, 1.0000 before: a loss of 0.0114, limit 0.01",
        "| Dice, right structure | 0.9773 | 1.0000 | -0.0227 |",
        "Backward transfer (Dice of the old test, new less old): -0.0114",
        "| max_dice_loss | 0.01 |",
        "the bundle has no sanity cases",
    ):
        assert words in note, words
    assert [what for what, *_ in figure_rows(row.report)][:3] == [
        "mean Dice",
        "Dice, left structure",
        "Dice, right structure",
    ]
