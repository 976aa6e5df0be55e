"""gateway.intake.admission: the gateway's own canary is let in from its own host, and from nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.intake.admission import Admission, Refusal, is_own_address, own_address
from gateway.settings import CanarySettings, GatewaySettings, ReceiverSettings, SenderSettings
from storage.spool import Spool

CANARY = "SEGGATE_CANARY"


def asked(folder: Path, peer_address: str, *, canary_ae: str | None = CANARY, host: str = "0.0.0.0") -> Refusal | None:
    spool = Spool(folder, reserve_bytes=0)
    spool.prepare()
    senders = [SenderSettings(ae_title="CT1", addresses=("10.1.0.0/16",))]
    admission = Admission(ReceiverSettings(host=host), senders, spool, canary_ae=canary_ae)
    return admission.request(
        association_id="a", calling_ae=f"{CANARY} ", called_ae="SEGGATE", peer_address=peer_address
    )


@pytest.mark.requirement("OPS-59")
@pytest.mark.parametrize(
    ("peer_address", "host", "refusal"),
    [
        ("127.0.0.1", "0.0.0.0", None),
        ("127.0.0.9", "0.0.0.0", None),
        ("::1", "::", None),
        ("::ffff:127.0.0.1", "::", None),
        ("10.1.2.3", "0.0.0.0", Refusal.ADDRESS),
        ("10.1.2.3", "10.1.2.3", None),  # listened on: nobody else has this address
        ("10.1.2.4", "10.1.2.3", Refusal.ADDRESS),
        ("10.1.2.3", "gateway.example", Refusal.ADDRESS),
    ],
)
def test_a_canary_comes_from_this_host_alone(
    tmp_path: Path, peer_address: str, host: str, refusal: Refusal | None
) -> None:
    assert asked(tmp_path, peer_address, host=host) is refusal


def test_without_a_canary_its_title_is_one_like_any_other(tmp_path: Path) -> None:
    assert asked(tmp_path, "127.0.0.1", canary_ae=None) is Refusal.CALLING_AE


def test_a_sender_cannot_have_the_canarys_title() -> None:
    with pytest.raises(ValueError, match=r"canary.ae_title: SEGGATE_CANARY is one of \[\[senders\]\]"):
        GatewaySettings(senders=(SenderSettings(ae_title=CANARY),))
    GatewaySettings(senders=(SenderSettings(ae_title=CANARY),), canary=CanarySettings(ae_title="TWEET"))


@pytest.mark.parametrize(
    ("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("localhost", "127.0.0.1"), ("10.1.2.3", "10.1.2.3")]
)
def test_a_receiver_is_reached_from_its_own_host(host: str, reached: str) -> None:
    assert own_address(host) == reached
    assert is_own_address(reached, host)
