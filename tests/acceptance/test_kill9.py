"""kill -9 at every step boundary of worker and delivery: afterwards exactly one SEG, one SR and one report (QUE-27).

One gateway, one Orthanc and one EMR for all; a study of its own per step. For each step the process dies before it
and, after its restart, again between the step's own commit and the engine's note of it, and where there is an outside
world between the two, there as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import pacs
from tests.support.peers import require_peer
from tests.support.whole_gateway import WholeGateway, running_emr, whole_gateway

# Once per study, whatever died on the way. A delivery ends once per destination.
_ONCE = ("declared-whole", "routed", "ordered", "inferred", "judged", "encoded", "released")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    require_peer("orthanc")
    folder = tmp_path_factory.mktemp("kill9")
    with (
        pacs.orthanc(folder / "pacs") as archive,
        running_emr(folder / "emr", pacs.free_port()) as emr_url,
        whole_gateway(folder / "gateway", pacs_address=(archive.ae_title, archive.port), emr_url=emr_url) as gateway,
    ):
        gateway.start_receiver()
        gateway.start("worker", lives=True)
        gateway.start("services", lives=True)
        yield gateway


@pytest.mark.requirement("QUE-27")
@pytest.mark.parametrize(
    "points",
    [
        pytest.param(("route:begin", "route:end"), id="route"),
        pytest.param(("order:begin", "order:end"), id="order"),
        pytest.param(("infer:begin", "predict", "infer:end"), id="infer"),
        pytest.param(("judge:begin", "judge:end"), id="judge"),
        pytest.param(("encode:begin", "encode:end"), id="encode"),
        pytest.param(("release:begin", "release:end"), id="release"),
        pytest.param(("attempt-pacs:begin", "pacs:sent", "attempt-pacs:end"), id="delivery to the PACS"),
        pytest.param(("attempt-emr:begin", "emr:sent", "attempt-emr:end"), id="report to the EMR"),
    ],
)
def test_killed_at_a_boundary_each_result_exists_once(
    gateway: WholeGateway, points: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    study = gateway.write_study(request.node.callspec.id)
    for point in points:
        gateway.kill_at(point)
    gateway.send(study.files)
    gateway.wait_for_death_at(*points)
    gateway.wait_for_state(study.uid, "verified")

    (result,) = gateway.results(study.uid)
    objects = gateway.objects(result.result_id)
    found = gateway.in_pacs(study.uid)
    assert found == {"SEG": [objects["SEG"].sop_instance_uid], "SR": [objects["SR"].sop_instance_uid]}
    (report,) = gateway.reports(study.uid)
    assert result.report_id == f"DiagnosticReport/{report['id']}"

    kinds = gateway.kinds(study.uid)
    assert {kind: kinds[kind] for kind in _ONCE} == dict.fromkeys(_ONCE, 1)
    assert kinds["parked"] == 0
    ended = [e.detail["destination"] for e in gateway.events(study.uid) if e.kind == "delivery-verified"]
    assert sorted(ended) == ["emr", "pacs"]
    assert gateway.verify_ledger() > 0
