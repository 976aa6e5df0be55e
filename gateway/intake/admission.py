"""Who may associate, and when: allow-list, called AE title, number of associations, free disk (REC-02, REC-04).

Beside the configured senders the gateway's own canary may (OPS-59), from this host alone, while one is configured.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from gateway.settings import ReceiverSettings, SenderSettings
from storage.errors import SpoolUnsafe
from storage.spool import Spool

_MAX_KEYS = 256  # different refusals told apart at a time; a flood with invented names is folded into "*"
_FOLDED = "*"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refusal(Enum):
    """Why an association is refused: (result, source, diagnostic) of the A-ASSOCIATE-RJ (PS3.8 9.3.4), and words."""

    CALLING_AE = ((1, 1, 3), "calling AE title not recognized: add it to [[senders]] in gateway.toml")
    ADDRESS = ((1, 1, 3), "the address is not one that [[senders]] allows for this AE title")
    CALLED_AE = ((1, 1, 7), "called AE title not recognized: the sender must call receiver.ae_title")
    ASSOCIATIONS = ((2, 3, 2), "receiver.max_associations are open")
    DISK = ((2, 3, 1), "free disk space is below receiver.reserve_mb")
    SPOOL = ((2, 3, 1), "the spool folder cannot be used")
    DRAINING = ((2, 3, 1), "the receiver is shutting down")

    @property
    def code(self) -> tuple[int, int, int]:
        return self.value[0]

    @property
    def reason(self) -> str:
        return self.value[1]


class Admission:
    """Decides on each association request; thread-safe."""

    def __init__(
        self,
        settings: ReceiverSettings,
        senders: Sequence[SenderSettings],
        spool: Spool,
        *,
        canary_ae: str | None = None,
    ) -> None:
        self._called_ae = settings.ae_title.strip() if settings.check_called_ae else None
        self._limit = settings.max_associations
        self._spool = spool
        self._senders: dict[str, list[tuple[Network, ...]]] = {}
        for sender in senders:
            networks = tuple(ipaddress.ip_network(address, strict=False) for address in sender.addresses)
            self._senders.setdefault(sender.ae_title.strip(), []).append(networks)
        if canary_ae is not None:
            self._senders[canary_ae.strip()] = [_own_networks(settings.host)]
        self._lock = threading.Lock()
        self._open: set[str] = set()
        self._draining = False

    def request(self, *, association_id: str, calling_ae: str, called_ae: str, peer_address: str) -> Refusal | None:
        """Admit the association (and count it until `closed`), or say why not."""
        allowed = self._senders.get(calling_ae.strip())
        if allowed is None:
            return Refusal.CALLING_AE
        if not any(_contains(networks, peer_address) for networks in allowed):
            return Refusal.ADDRESS
        if self._called_ae is not None and called_ae.strip() != self._called_ae:
            return Refusal.CALLED_AE
        try:
            if not self._spool.has_space():
                return Refusal.DISK
        except SpoolUnsafe:
            return Refusal.SPOOL
        with self._lock:
            if self._draining:
                return Refusal.DRAINING
            if len(self._open) >= self._limit:
                return Refusal.ASSOCIATIONS
            self._open.add(association_id)
        return None

    def closed(self, association_id: str) -> None:
        """The association is over; harmless when it was never admitted."""
        with self._lock:
            self._open.discard(association_id)

    def drain(self) -> None:
        """Refuse everything from now on."""
        with self._lock:
            self._draining = True

    @property
    def open_associations(self) -> int:
        with self._lock:
            return len(self._open)


def own_address(host: str) -> str:
    """Where a receiver that listens on `host` is reached from its own host."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host)  # noqa: S104


def is_own_address(peer_address: str, host: str) -> bool:
    """Whether an object came from the host itself: from loopback, or from the very address that is listened on."""
    return _contains(_own_networks(host), peer_address)


def _own_networks(host: str) -> tuple[Network, ...]:
    own: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
    try:
        address = ipaddress.ip_address(own_address(host))
    except ValueError:  # a name: only loopback is certain
        return own
    return (*own, ipaddress.ip_network(address))


def plain_address(text: str) -> str:
    """An IP address as it is configured: an IPv4 address that came in IPv6 clothes loses them."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text[:64]
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def _contains(networks: tuple[Network, ...], peer_address: str) -> bool:
    if not networks:
        return True
    try:
        address = ipaddress.ip_address(plain_address(peer_address))
    except ValueError:
        return False
    return any(address in network for network in networks if network.version == address.version)


@dataclass(frozen=True, kw_only=True)
class RefusalKey:
    """What is counted as one kind of refusal."""

    kind: str  # association | object
    calling_ae: str
    called_ae: str
    peer_address: str
    reason: str


class RefusalCounter:
    """Counts refusals between two writes to the spool, in bounded memory; thread-safe.

    A flood of refused calls must not fill the disk: what is written is one small event per `take`, however many
    there were.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[RefusalKey, tuple[datetime, datetime, int]] = {}

    def add(self, key: RefusalKey) -> None:
        now = datetime.now(UTC)
        with self._lock:
            if key not in self._counts and len(self._counts) >= _MAX_KEYS:
                key = RefusalKey(
                    kind=key.kind, calling_ae=_FOLDED, called_ae=_FOLDED, peer_address=_FOLDED, reason=key.reason
                )
            first, _, count = self._counts.get(key, (now, now, 0))
            self._counts[key] = (first, now, count + 1)

    def take(self) -> list[dict[str, str | int]]:
        """All counts since the last call, as the detail of a "refused" event."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return [
            {
                "kind": key.kind,
                "calling_ae": key.calling_ae,
                "called_ae": key.called_ae,
                "peer_address": key.peer_address,
                "reason": key.reason,
                "first_at": first.isoformat(),
                "last_at": last.isoformat(),
                "count": count,
            }
            for key, (first, last, count) in counts.items()
        ]

    def put_back(self, taken: list[dict[str, str | int]]) -> None:
        """Add again what could not be written."""
        with self._lock:
            for entry in taken:
                key = RefusalKey(
                    **{name: str(entry[name]) for name in ("kind", "calling_ae", "called_ae", "peer_address", "reason")}
                )
                first, last = (datetime.fromisoformat(str(entry[name])) for name in ("first_at", "last_at"))
                _, later, count = self._counts.get(key, (first, last, 0))
                self._counts[key] = (first, later, count + int(entry["count"]))
