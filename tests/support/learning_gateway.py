"""A whole gateway that serves the model of tests/support/learning_site.py and may fine-tune it; nothing leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.bundle import load_bundle
from gateway.learning.registration import register
from gateway.learning.runs import runs_of
from storage.learning_records import LearningRun, RunState
from tests.support import learning_site as site
from tests.support.pacs import free_port
from tests.support.phantoms import PhantomSeries
from tests.support.whole_gateway import WholeGateway, whole_gateway


@contextmanager
def learning_gateway(
    folder: Path, trained: site.Trained, *, fine_tuning: str, worker: str = "", more: str = ""
) -> Iterator[WholeGateway]:
    """With its receiver; workers are the test's to start. `fine_tuning`: lines of [models.fine_tuning]; `worker` and
    `more`: of gateway.toml. One labelled case is enough, and what passes is promoted by itself."""
    locked = site.write_dataset(folder / "Dataset903_Locked", range(900, 910))
    nobody = ("NONE", free_port())
    with whole_gateway(
        folder / "gateway",
        pacs_address=nobody,
        emr_url=f"http://127.0.0.1:{nobody[1]}/fhir",
        worker=worker,
        more=more,
    ) as gateway:
        (gateway.config / "routes.toml").write_text(site.ROUTES)
        (gateway.config / "learning.toml").write_text(
            f"""[[models]]
name = "{site.MODEL}"
trained = "{trained.model}"
dataset = "{trained.raw}"
locked = "{locked}"
[models.selection]
least = 1
random_share = 0
[models.fine_tuning]
threads = 1
{fine_tuning}
[models.change_plan]
approval = "automatic"
max_dice_loss = 0.2
max_dice_loss_per_label = 0.3
max_runtime_ratio = 20
max_memory_ratio = 3
shadow_studies = 0
"""
        )
        register(gateway.settings, load_bundle(trained.bundle), candidate=False, actor="test")
        gateway.start_receiver()
        yield gateway


def send_patient(gateway: WholeGateway, seed: int) -> PhantomSeries:
    """One patient's study, sent and inferred; it waits for the PACS from then on."""
    study = site.write_study(gateway.folder / "sent" / str(seed), seed, f"P{seed}")
    gateway.send(study.files)
    gateway.wait_for_state(study.study_instance_uid, "delivering")
    return study


def approve(gateway: WholeGateway, study: PhantomSeries) -> None:
    """A reader says that the study's only result is right."""
    (result,) = gateway.results(study.study_instance_uid)
    site.run("corrections", "add", result.result_id, "--approve", "--config", str(gateway.config))


def only_run(gateway: WholeGateway) -> LearningRun:
    """The one training that there is, which goes well so far."""
    gateway.check_alive()
    with gateway.database.reading() as session:
        (run,) = runs_of(session, site.MODEL)
    assert run.state not in (RunState.FAILED, RunState.REFUSED), run.state_reason
    return run
