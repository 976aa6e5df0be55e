"""An urgent study does not wait for the end of a routine one that is in the networks (QUE-31)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.learning.registration import register
from storage.records import ResultState
from tests.support.intensity_model import write_intensity_bundle
from tests.support.pacs import free_port
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, whole_gateway

ROUTINE, URGENT = "hippocampus-mr", "trauma-mr"
PATIENT = "URGENT-1"
ROUTES = f"""
time_zone = "UTC"
[[rules]]
name = "trauma"
model = "{URGENT}"
priority = "urgent"
stop = true
when.all = [{{ attribute = "PatientID", op = "equals", value = "{PATIENT}" }}]
[[rules]]
name = "hippocampus"
model = "{ROUTINE}"
when.all = [{{ attribute = "Modality", op = "equals", value = "MR" }}]
"""


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    """One worker, which runs one inference at a time; results wait for a PACS that is not there."""
    folder, nobody = tmp_path_factory.mktemp("urgent"), ("NONE", free_port())
    with whole_gateway(
        folder / "gateway", pacs_address=nobody, emr_url=f"http://127.0.0.1:{nobody[1]}/fhir"
    ) as gateway:
        (gateway.config / "routes.toml").write_text(ROUTES)
        bundle = write_intensity_bundle(folder / "bundle" / URGENT, name=URGENT, spacing_mm=(1.0, 1.0, 1.0))
        register(gateway.settings, bundle, candidate=False, actor="test")
        gateway.start_receiver()
        yield gateway


@pytest.mark.requirement("QUE-31", open="a GPU")
def test_an_urgent_study_is_done_while_a_routine_one_is_between_its_windows(gateway: WholeGateway) -> None:
    routine, urgent = gateway.write_study("routine"), gateway.write_study("urgent", patient_id=PATIENT)
    point = f"window-{ROUTINE}"
    gateway.block_at(point)
    gateway.start("worker")
    gateway.send(routine.files)
    wait_until(lambda: gateway.blocked_pid(point), "the routine study is in the networks", timeout_s=120)
    gateway.send(urgent.files)
    gateway.wait_for_state(urgent.uid, "delivering", "held")
    (done,) = gateway.results(urgent.uid)
    assert done.runtime is not None
    (waiting,) = gateway.results(routine.uid)
    assert (waiting.state, waiting.runtime) == (ResultState.PENDING, None)

    gateway.unblock(point)
    gateway.wait_for_state(routine.uid, "delivering")
    (result,) = gateway.results(routine.uid)
    assert (result.state, result.attempts) == (ResultState.RELEASED, 1)
    gateway.end("worker")
    assert gateway.verify_ledger() > 0
