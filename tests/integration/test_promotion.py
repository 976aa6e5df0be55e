"""Promotion and rollback: who may, what is written, and that a version serves at every moment, whoever dies when."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Rejected, meaning
from gateway.learning.promotion import POLICY, PromotionRefused, promote, roll_back
from gateway.learning.registration import register_bundle
from gateway.learning.registry_check import check_model
from gateway.learning.serving import open_period, overtaken, periods
from gateway.learning_settings import ChangePlan
from storage import ledger
from storage.database import Database
from storage.errors import ModelChanged, ModelMissing
from storage.models import CANDIDATE, CHAMPION, PREVIOUS, SHADOW, ModelRegistry, RegisteredModel
from storage.records import LedgerEvent, utc_now
from tests.support.databases import KINDS, new_database_url
from tests.support.versions import PLAN, add_report, add_shadow_runs, register_versions, write_version

pytestmark = pytest.mark.requirement("ART-22")
APPROVER, REQUESTER = "user:approver", "user:requester"


class Killed(BaseException):
    """What a kill looks like from inside: no `except` of the code under test sees it."""


class MortalRegistry(ModelRegistry):
    """Notes who is champion before and after each write, and dies before the write with the number `dies_at`."""

    dies_at: int | None = None
    writes = 0
    seen: list[str | None]

    def _mortal(self, name: str, write: Callable[[], None]) -> None:
        self._look(name)
        self.writes += 1
        if self.writes - 1 == self.dies_at:
            raise Killed
        write()
        self._look(name)

    def _look(self, name: str) -> None:
        champions = [m.semver for m in self.versions(name) if CHAMPION in m.aliases]
        self.seen.append(champions[0] if len(champions) == 1 else None)

    def _point(self, name: str, alias: str, model: RegisteredModel | None) -> None:
        self._mortal(name, lambda: super(MortalRegistry, self)._point(name, alias, model))

    def note_settled(self, name: str, period_id: int) -> None:
        self._mortal(name, lambda: super(MortalRegistry, self).note_settled(name, period_id))


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One registry for all tests here, which MLflow takes seconds to make; each test has models of its own in it."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    found.create_all()
    yield found
    found.close()


@pytest.fixture(params=KINDS)
def either_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """For what locks: SQLite queues all writers up, PostgreSQL those of one chain."""
    found = Database(new_database_url(request, tmp_path))
    found.create_all()
    yield found
    found.close()


@pytest.fixture(scope="module")
def registry(models_folder: Path) -> ModelRegistry:
    return ModelRegistry(models_folder)


@pytest.fixture(scope="module")
def immortal(models_folder: Path) -> MortalRegistry:
    return MortalRegistry(models_folder)


@pytest.fixture
def mortal(immortal: MortalRegistry) -> Iterator[MortalRegistry]:
    found = immortal
    found.seen, found.writes, found.dies_at = [], 0, None
    yield found
    found.dies_at = None
    while found.seen and found.seen[0] is None:
        del found.seen[0]
    assert None not in found.seen, "after the first there was a moment without a champion"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model of this test alone."""
    return f"m{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


def aliases(registry: ModelRegistry, name: str) -> dict[str, str]:
    return {alias: model.semver for model in registry.versions(name) for alias in model.aliases}


def events(database: Database, name: str) -> list[LedgerEvent]:
    with database.reading() as session:
        return list(ledger.events(session, ledger.model_subject(name)))


def kinds(database: Database, name: str) -> list[tuple[str, Any]]:
    return [(event.kind, event.detail["semver"]) for event in events(database, name)]


def put(database: Database, registry: ModelRegistry, model: RegisteredModel, **how: Any) -> RegisteredModel:
    """Promotes a version that has all that the plan asks for."""
    asked: dict[str, Any] = {"actor": APPROVER, "plan": PLAN} | how
    return promote(database, registry, model.name, model.semver, **asked)


def force(database: Database, registry: ModelRegistry, name: str, semver: str) -> RegisteredModel:
    return promote(database, registry, name, semver, actor=APPROVER, plan=PLAN, force=True, reason="a test")


def test_the_first_version_serves_and_the_second_waits(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    assert aliases(registry, name) == {CHAMPION: "1.0.0", CANDIDATE: "1.1.0"}
    with database.reading() as session:
        [period] = periods(session, name)
    assert (period.model_version, period.previous_version, period.began_by) == ("1.0.0", None, "user:importer")
    assert kinds(database, name) == [
        ("model-imported", "1.0.0"),
        ("model-promoted", "1.0.0"),
        ("model-imported", "1.1.0"),
    ]


def test_a_promotion_says_who_why_and_on_what_grounds(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    plan = ChangePlan(shadow_studies=2)
    first, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second, plan=plan)
    add_shadow_runs(database, second, "done", "failed", "done")
    registry.set_shadow(name, "1.1.0")
    promoted = put(database, registry, second, plan=plan, reason="regains the new scanner")
    assert promoted.state == CHAMPION
    assert aliases(registry, name) == {CHAMPION: "1.1.0", PREVIOUS: "1.0.0"}
    with database.reading() as session:
        before, now = periods(session, name)
        assert ledger.verify(session, ledger.model_subject(name)) == 4
    assert (before.model_version, before.ended_why, before.rolled_back) == ("1.0.0", "1.1.0 was promoted", False)
    assert before.ended_at == now.began_at
    assert (now.model_version, now.weights_digest, now.previous_version) == ("1.1.0", second.weights_digest, "1.0.0")
    event = events(database, name)[-1]
    assert (event.kind, event.actor) == ("model-promoted", APPROVER)
    detail = event.detail
    assert (detail["semver"], detail["weights_digest"]) == ("1.1.0", second.weights_digest)
    assert detail["configuration_digest"] == second.configuration_digest
    assert (detail["previous"], detail["requested_by"], detail["reason"]) == (
        "1.0.0",
        REQUESTER,
        "regains the new scanner",
    )
    assert detail["plans_digest"] == second.provenance["plans_digest"] != first.provenance["dataset_digest"]
    assert detail["gate"]["verdict"] == "ACCEPTED"
    assert detail["gate"]["figures"]["dice"] == {"candidate": 0.93, "champion": 0.9, "cases": 12}
    assert (detail["shadow_studies"], detail["shadow_studies_asked"], detail["forced"]) == (2, 2, False)


def test_all_that_is_missing_is_named_at_once_and_nothing_changes(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_shadow_runs(database, second, "done", "pending")
    before = kinds(database, name)
    with pytest.raises(PromotionRefused) as refused:
        put(database, registry, second, plan=ChangePlan(shadow_studies=20), actor=REQUESTER, requested_by=REQUESTER)
    assert [text.split(":")[0] for text in refused.value.missing] == [
        "no gate report for these weights under the change plan as it is now",
        "it ran in shadow on 1 of 20 studies",
        "another person",
    ]
    assert meaning(refused.value) is Rejected
    assert aliases(registry, name) == {CHAMPION: "1.0.0", CANDIDATE: "1.1.0"}
    assert kinds(database, name) == before


@pytest.mark.requirement("ART-23", open="the suite itself, shadow running, the automatic rollback")
@pytest.mark.parametrize(
    ("report", "missing"),
    [
        ({"verdict": "REJECTED"}, "says REJECTED"),
        ({"verdict": "OUTSIDE_PLAN"}, "says OUTSIDE_PLAN"),
        ({"weights_digest": "f" * 64}, "no gate report for these weights"),
        ({"plan": ChangePlan(shadow_studies=0, max_dice_loss=0.5)}, "under the change plan as it is now"),
        ({"against": "0.9.0"}, "compares it with 0.9.0, and 1.0.0 serves"),
        ({"against": None}, "compares it with no version, and 1.0.0 serves"),
    ],
)
def test_only_an_accepted_report_of_these_weights_against_the_champion_under_this_plan_counts(
    database: Database,
    registry: ModelRegistry,
    tmp_path: Path,
    name: str,
    report: dict[str, Any],
    missing: str,
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second, **report)
    with pytest.raises(PromotionRefused, match=missing):
        put(database, registry, second)


def test_a_refusal_tells_the_reasons_of_the_report(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    texts = ["its labels are not those of 1.0.0, which serves", "the locked cases have labels 1"]
    reasons = [{"check": "labels", "text": text, "figure": None, "limit": None, "outside": True} for text in texts]
    add_report(database, second, verdict="OUTSIDE_PLAN", report={"reasons": reasons})
    with pytest.raises(PromotionRefused, match=f"says OUTSIDE_PLAN: {'; '.join(texts)}; .* --force --reason TEXT"):
        put(database, registry, second)
    put(database, registry, second, force=True, reason="validated by a reader study")
    assert events(database, name)[-1].detail["overridden"] == [f"gate report 1 says OUTSIDE_PLAN: {'; '.join(texts)}"]


def test_the_last_report_counts_not_the_best(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second)
    add_report(database, second, verdict="REJECTED")
    with pytest.raises(PromotionRefused, match="says REJECTED"):
        put(database, registry, second)


@pytest.mark.requirement("ART-23", open="the suite itself, shadow running, the automatic rollback")
@pytest.mark.parametrize(
    ("actor", "asked", "approval", "missing"),
    [
        ("user:requester", None, "other-person", "another person: requester asked for it"),
        ("requester", None, "other-person", "another person"),
        # Naming somebody else does not make the requester another person.
        ("user:requester", "user:somebody", "other-person", "another person"),
        ("user:approver", "approver", "other-person", "another person"),
        (POLICY, None, "other-person", "a person"),
        ("user:approver", None, "other-person", None),
        ("user:requester", None, "automatic", None),
        (POLICY, None, "automatic", None),
    ],
)
def test_who_asked_for_a_version_does_not_promote_it_unless_the_plan_says_automatic(
    database: Database,
    registry: ModelRegistry,
    tmp_path: Path,
    name: str,
    actor: str,
    asked: str | None,
    approval: Any,
    missing: str | None,
) -> None:
    plan = ChangePlan(shadow_studies=0, approval=approval)
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second, plan=plan, requested_by=REQUESTER)
    if missing is None:
        assert put(database, registry, second, plan=plan, actor=actor, requested_by=asked).state == CHAMPION
    else:
        with pytest.raises(PromotionRefused, match=missing):
            put(database, registry, second, plan=plan, actor=actor, requested_by=asked)


def test_automatic_lifts_neither_gate_nor_shadow(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    plan = ChangePlan(approval="automatic", shadow_studies=1)
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    with pytest.raises(PromotionRefused) as refused:
        put(database, registry, second, plan=plan, actor=POLICY)
    assert len(refused.value.missing) == 2


def test_an_operator_may_force_it_with_a_reason_and_the_ledger_says_so(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    for how in ({"reason": " "}, {"reason": "drill", "actor": POLICY}):
        with pytest.raises(PromotionRefused, match="only a person may force it, with a reason"):
            put(database, registry, second, force=True, **how)
    put(database, registry, second, force=True, reason="a drill", system_user="seggate")
    detail = events(database, name)[-1].detail
    assert (detail["forced"], detail["reason"], detail["system_user"]) == (True, "a drill", "seggate")
    assert ["no gate report" in text for text in detail["overridden"]] == [True]


@pytest.mark.parametrize("forced", [False, True])
def test_files_that_are_not_what_was_registered_are_never_promoted(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str, forced: bool
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second)
    weights = next(second.folder.rglob("*.onnx"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(Exception, match="the file was changed"):
        put(database, registry, second, force=forced, reason="I insist")
    # Another bundle in its place, whole in itself.
    other = write_version(tmp_path / "other", name, "1.1.0", edge=600)
    for path in sorted(second.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    second.folder.rmdir()
    other.root.rename(second.folder)
    with pytest.raises(ModelChanged, match="not those that were registered"):
        put(database, registry, second, force=forced, reason="I insist")
    assert aliases(registry, name)[CHAMPION] == "1.0.0"


def test_a_tag_that_was_changed_together_with_the_files_is_found_by_the_ledger(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    other = write_version(tmp_path / "other", name, "1.1.0", edge=600)
    for path in sorted(second.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    second.folder.rmdir()
    other.root.rename(second.folder)
    client = registry._mlflow()
    for key, value in (
        ("weights_digest", other.weights_digest),
        ("configuration_digest", other.configuration_digest),
    ):
        client.set_model_version_tag(name, str(second.registry_version), key, value)
    with pytest.raises(ModelChanged, match="differs from the ledger"):
        force(database, registry, name, "1.1.0")
    assert "other digests than the ledger" in check_model(database, registry, name)


def test_a_version_whose_voxel_order_was_guessed_is_never_promoted(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    bundle = write_version(tmp_path, name, "1.0.0")
    register_bundle(database, registry, bundle, candidate=True, actor="user:x", orientation_stated=False)
    with pytest.raises(PromotionRefused, match="voxel order"):
        force(database, registry, name, "1.0.0")


def test_a_model_of_which_none_served_yet_needs_no_comparison(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    bundle = write_version(tmp_path, name, "1.0.0")
    model = register_bundle(database, registry, bundle, candidate=True, actor="user:x")
    assert (model.state, check_model(database, registry, name)) == (CANDIDATE, "")
    assert put(database, registry, model, plan=ChangePlan()).state == CHAMPION


def test_promoting_what_serves_changes_nothing(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    [first] = register_versions(database, registry, tmp_path, name, "1.0.0")
    before = kinds(database, name)
    assert put(database, registry, first).semver == "1.0.0"
    assert kinds(database, name) == before
    with pytest.raises(ModelMissing, match=r"9\.9\.9"):
        promote(database, registry, name, "9.9.9", actor=APPROVER, plan=PLAN)


WRITES_OF_A_PROMOTION = 5  # champion, previous, candidate, shadow, and that it is settled


@pytest.mark.parametrize("write", range(WRITES_OF_A_PROMOTION))
def test_a_promotion_that_is_killed_at_any_point_is_finished_by_the_next_call(
    database: Database, mortal: MortalRegistry, tmp_path: Path, name: str, write: int
) -> None:
    _, second, _ = register_versions(database, mortal, tmp_path, name, "1.0.0", "1.1.0", "1.2.0")
    mortal.set_candidate(name, "1.1.0")
    mortal.set_shadow(name, "1.1.0")
    add_report(database, second)
    mortal.writes, mortal.dies_at = 0, write
    with pytest.raises(Killed):
        put(database, mortal, second)
    assert mortal.champion(name).semver in ("1.0.0", "1.1.0")
    mortal.dies_at = None
    # By now the report is that of another plan: what was decided stays decided.
    assert put(database, mortal, second, plan=ChangePlan()).state == CHAMPION
    assert aliases(mortal, name) == {CHAMPION: "1.1.0", PREVIOUS: "1.0.0"}
    assert kinds(database, name).count(("model-promoted", "1.1.0")) == 1
    assert check_model(database, mortal, name) == ""


def test_the_kills_above_are_at_every_write(
    database: Database, mortal: MortalRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, mortal, tmp_path, name, "1.0.0", "1.1.0")
    mortal.set_shadow(name, "1.1.0")
    add_report(database, second)
    mortal.writes = 0
    put(database, mortal, second)
    assert mortal.writes == WRITES_OF_A_PROMOTION
    # The champion was the old one up to a write, and the new one from then on.
    assert set(mortal.seen[-2 * WRITES_OF_A_PROMOTION :]) == {"1.0.0", "1.1.0"}


def test_a_promotion_that_dies_before_its_transaction_is_committed_has_not_happened(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second)
    append = ledger.append

    def dies(*args: Any, **kwargs: Any) -> Any:
        append(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(ledger, "append", dies)
    with pytest.raises(Killed):
        put(database, registry, second)
    assert aliases(registry, name)[CHAMPION] == "1.0.0"
    with database.reading() as session:
        period = open_period(session, name)
    assert period is not None
    assert period.model_version == "1.0.0"
    assert ("model-promoted", "1.1.0") not in kinds(database, name)


@pytest.mark.requirement("ART-23", open="the suite itself, shadow running, what watches the first studies")
def test_a_rollback_lets_the_last_stable_version_serve_and_says_why(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0", "1.2.0")
    watched = utc_now() - timedelta(days=1)
    force(database, registry, name, "1.1.0")
    with database.session() as session:
        known = periods(session, name)
        known[-1].watched_until = watched
    force(database, registry, name, "1.2.0")
    back = roll_back(database, registry, name, actor="watch", reason="9 of 30 results empty", withdrawn="1.2.0")
    assert back.semver == "1.1.0"
    assert aliases(registry, name) == {CHAMPION: "1.1.0", PREVIOUS: "1.0.0"}
    with database.reading() as session:
        *_, withdrawn, now = periods(session, name)
    assert (withdrawn.model_version, withdrawn.rolled_back) == ("1.2.0", True)
    assert withdrawn.ended_why == "9 of 30 results empty"
    assert (now.model_version, now.previous_version, now.watched_until) == ("1.1.0", "1.0.0", watched)
    event = events(database, name)[-1]
    assert (event.kind, event.actor) == ("model-rolled-back", "watch")
    assert (event.detail["semver"], event.detail["withdrawn"]) == ("1.1.0", "1.2.0")
    assert event.detail["reason"] == "9 of 30 results empty"


def test_a_rollback_that_is_repeated_for_the_same_version_goes_no_further_back(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0", "1.2.0")
    force(database, registry, name, "1.1.0")
    force(database, registry, name, "1.2.0")
    for _ in range(3):
        assert roll_back(database, registry, name, actor="watch", reason="x", withdrawn="1.2.0").semver == "1.1.0"
    # By hand it goes on to what was stable before, never to what was withdrawn.
    assert roll_back(database, registry, name, actor=APPROVER, reason="x").semver == "1.0.0"
    with pytest.raises(PromotionRefused, match="no earlier version"):
        roll_back(database, registry, name, actor=APPROVER, reason="x")
    assert aliases(registry, name) == {CHAMPION: "1.0.0"}


def test_a_damaged_version_is_passed_over(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second, _ = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0", "1.2.0")
    force(database, registry, name, "1.1.0")
    force(database, registry, name, "1.2.0")
    next(second.folder.rglob("*.onnx")).unlink()
    assert roll_back(database, registry, name, actor=APPROVER, reason="bad").semver == "1.0.0"
    assert "missing" in events(database, name)[-1].detail["passed_over"]["1.1.0"]


def test_without_any_version_to_go_back_to_the_champion_stays(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    with pytest.raises(PromotionRefused, match="no version of it serves"):
        roll_back(database, registry, name, actor=APPROVER, reason="bad")
    first, _ = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    force(database, registry, name, "1.1.0")
    next(first.folder.rglob("*.onnx")).unlink()
    with pytest.raises(PromotionRefused, match=r"1\.0\.0 cannot serve"):
        roll_back(database, registry, name, actor=APPROVER, reason="bad")
    assert aliases(registry, name)[CHAMPION] == "1.1.0"


def test_what_was_rolled_back_needs_a_new_examination(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second)
    put(database, registry, second)
    roll_back(database, registry, name, actor="watch", reason="bad")
    with pytest.raises(PromotionRefused, match="rolled back since gate report"):
        put(database, registry, second)
    add_report(database, second)
    assert put(database, registry, second).state == CHAMPION
    # And is stable no more than before: it can be withdrawn again.
    assert roll_back(database, registry, name, actor="watch", reason="bad again").semver == "1.0.0"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("write", range(3))  # champion, previous, and that it is settled
def test_a_rollback_that_is_killed_at_any_point_is_finished_by_the_next_call(
    database: Database, mortal: MortalRegistry, tmp_path: Path, name: str, write: int, named: bool
) -> None:
    register_versions(database, mortal, tmp_path, name, "1.0.0", "1.1.0", "1.2.0")
    force(database, mortal, name, "1.1.0")
    force(database, mortal, name, "1.2.0")
    how: dict[str, Any] = {"actor": "watch", "reason": "bad", "withdrawn": "1.2.0" if named else None}
    mortal.writes, mortal.dies_at = 0, write
    with pytest.raises(Killed):
        roll_back(database, mortal, name, **how)
    assert mortal.champion(name).semver in ("1.1.0", "1.2.0")
    mortal.dies_at = None
    assert roll_back(database, mortal, name, **how).semver == "1.1.0"
    assert aliases(mortal, name) == {CHAMPION: "1.1.0", PREVIOUS: "1.0.0"}
    assert [kind for kind, _ in kinds(database, name)].count("model-rolled-back") == 1


def test_promotions_at_once_end_with_one_champion_that_registry_and_ledger_agree_on(
    either_database: Database, mortal: MortalRegistry, models_folder: Path, tmp_path: Path, name: str
) -> None:
    database = either_database
    semvers = ["1.1.0", "1.2.0", "1.3.0", "1.4.0"]
    register_versions(database, mortal, tmp_path, name, "1.0.0", *semvers)
    together = threading.Barrier(len(semvers))
    errors: list[BaseException] = []

    def run(semver: str) -> None:
        try:
            own = ModelRegistry(models_folder)  # another process has its own
            own.versions(name)
            together.wait()
            force(database, own, name, semver)
        except BaseException as error:  # noqa: BLE001 - reported to the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(semver,)) for semver in semvers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        mortal._look(name)
    for thread in threads:
        thread.join()
    assert errors == []
    with database.reading() as session:
        known = periods(session, name)
        assert ledger.verify(session, ledger.model_subject(name)) == 10
    assert sorted(p.model_version for p in known[1:]) == semvers
    assert [p.previous_version for p in known[1:]] == [p.model_version for p in known[:-1]]
    assert aliases(mortal, name) == {
        CHAMPION: known[-1].model_version,
        PREVIOUS: known[-2].model_version,
        **{a: v for a, v in aliases(mortal, name).items() if a in (CANDIDATE, SHADOW)},
    }
    assert check_model(database, mortal, name) == ""


def test_a_version_is_not_withdrawn_while_a_study_is_ordered_from_it(
    either_database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    database = either_database
    register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    force(database, registry, name, "1.1.0")
    began = threading.Event()

    def withdraw() -> None:
        began.set()
        roll_back(database, registry, name, actor="watch", reason="bad", withdrawn="1.1.0")

    thread = threading.Thread(target=withdraw)
    with database.session() as session:
        assert not overtaken(session, name, "1.1.0")
        thread.start()
        assert began.wait(10)
        thread.join(1.0)
        assert thread.is_alive(), "the rollback did not wait for the order"
    thread.join()
    with database.session() as session:
        assert overtaken(session, name, "1.1.0")
        assert not overtaken(session, name, "1.0.0")
        assert not overtaken(session, "a model without periods", "1.0.0")


def test_two_who_accept_the_same_version_promote_it_once(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    _, second = register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    add_report(database, second)
    for actor in (APPROVER, "user:third"):
        put(database, registry, second, actor=actor)
    assert kinds(database, name).count(("model-promoted", "1.1.0")) == 1
