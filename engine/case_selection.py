"""Which cases are learnt from: unsure ones that differ from each other, and by chance a few that are kept apart.

Two ways lead into a selection and never cross:

    by chance    a share of all patients, drawn by seed: their cases measure how good the model is, and are never learnt
    unsure       of all other cases those of the lowest confidence, and of these the ones that differ most

Uncertainty alone would choose the same case many times, so that the unsure ones are spread by greedy k-centre (Sener
and Savarese, ICLR 2018). Nothing here is random beyond the seed: the same cases give the same selection in any order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Why = Literal["uncertain", "corrected", "random"]
"""`corrected`: asked for whatever its confidence; `random`: drawn by chance, for measuring alone."""

# So many times more unsure cases than are wanted are looked at for different ones, but never the surer half of all.
_POOL = 2
_FARTHEST = 3.0
"""Standard deviations; a value that is farther out counts as this far, so that one odd case does not rule the rest."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A case that may be chosen. `confidence` is from 0 to 1 and None where it is not known: such a case is chosen by
    chance alone. `features` describe it as numbers, by name, whatever of them is known; `scanner` is compared as text.
    `patient`: any text that is the same for all cases of one person; it leaves this module in no form.

    `is_labelled`: right labels are there. `is_required`: it is to be learnt from whatever its confidence.
    `is_known`: the patient has been learnt from, so that a case of theirs measures nothing.
    """

    id: str
    confidence: float | None
    at: datetime
    scanner: str
    patient: str
    features: Mapping[str, float] = field(default_factory=dict)
    is_labelled: bool = False
    is_required: bool = False
    is_known: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A case that was chosen."""

    id: str
    why: Why


def select_cases(candidates: Iterable[Candidate], *, most: int, random_share: float, seed: str) -> tuple[Choice, ...]:
    """At most `most` cases to be learnt from (those that are required first, then unsure ones, the least sure first),
    and beside them so many by chance that they are `random_share` (below 1) of all that are chosen.

    Among the unsure, labelled ones are taken before others. Whether a patient is drawn depends on `seed` and patient
    alone: not on confidence, not on who else is there.
    """
    cases = sorted(candidates, key=_order)
    drawn = [case for case in cases if not case.is_known and _draw(seed, case.patient) < random_share]
    apart = {case.id for case in drawn}
    open_ = [case for case in cases if case.id not in apart]
    required = [case for case in open_ if case.is_required][:most]
    unsure = _unsure([case for case in open_ if not case.is_required], required, most - len(required))
    taken = [*(Choice(id=c.id, why="corrected") for c in required), *(Choice(id=c.id, why="uncertain") for c in unsure)]
    wanted = 0
    if drawn and random_share > 0:
        wanted = max(1, round(len(taken) * random_share / (1.0 - random_share)))
    drawn.sort(key=lambda case: _draw(seed, case.patient))  # stable: of one patient the order from above
    return (*taken, *(Choice(id=case.id, why="random") for case in drawn[:wanted]))


def _order(case: Candidate) -> tuple[float, float, str]:
    """The least sure first, the latest of them first."""
    confidence = math.inf if case.confidence is None else case.confidence
    return confidence, -case.at.timestamp(), case.id


def _draw(seed: str, patient: str) -> float:
    """Evenly from 0 to 1."""
    digest = hashlib.sha256(f"{seed}\n{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _unsure(ordered: Sequence[Candidate], centres: Sequence[Candidate], wanted: int) -> list[Candidate]:
    """`wanted` of the cases, which are in order of confidence, that differ from the centres and from each other."""
    known = [case for case in ordered if case.confidence is not None]
    pool = known[: max(wanted, min(_POOL * wanted, math.ceil(len(known) / 2)))]
    chosen = [case for case in pool if case.is_labelled][:wanted]
    ids = {case.id for case in chosen}
    rest = [case for case in pool if case.id not in ids]
    chosen += _k_centre(rest, [*centres, *chosen], wanted - len(chosen))
    return sorted(chosen, key=_order)


def _k_centre(cases: Sequence[Candidate], centres: Sequence[Candidate], wanted: int) -> list[Candidate]:
    """Greedily, each time the case that is farthest from all centres; without centres the first is one. Ties go to the
    first."""
    if wanted >= len(cases):
        return list(cases)
    everybody = [*cases, *centres]
    places = _standardized(everybody)
    scanners = np.array([case.scanner for case in everybody])
    nearest = np.full(len(cases), np.inf)
    for centre in range(len(cases), len(everybody)):
        nearest = np.minimum(nearest, _distances(places, scanners, centre)[: len(cases)])
    chosen: list[int] = []
    for _ in range(wanted):
        index = int(np.argmax(nearest))
        chosen.append(index)
        nearest = np.minimum(nearest, _distances(places, scanners, index)[: len(cases)])
        nearest[chosen] = -1.0
    return [cases[index] for index in chosen]


def _standardized(cases: Sequence[Candidate]) -> NDArray[np.float64]:
    """(cases, features): 0 is the mean, 1 a standard deviation; what is not known is the mean. Features that do not
    vary are left out."""
    names = sorted({name for case in cases for name in case.features})
    table = np.array([[case.features.get(name, math.nan) for name in names] for case in cases], dtype=np.float64)
    table = table.reshape(len(cases), len(names))
    columns = []
    for column in table.T:
        known = np.isfinite(column)
        spread = float(column[known].std()) if known.any() else 0.0
        if spread > 0:
            scaled = (column - column[known].mean()) / spread
            columns.append(np.clip(np.where(known, scaled, 0.0), -_FARTHEST, _FARTHEST))
    return np.stack(columns, axis=1) if columns else np.zeros((len(cases), 0))


def _distances(places: NDArray[np.float64], scanners: NDArray[np.str_], centre: int) -> NDArray[np.float64]:
    """From the case `centre`: the root mean square over the features, and 1 more for another scanner."""
    away = places - places[centre]
    spread = np.sqrt((away**2).mean(axis=1)) if places.shape[1] else np.zeros(len(places))
    result: NDArray[np.float64] = spread + (scanners != scanners[centre])
    return result
