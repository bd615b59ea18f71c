"""How two adapters differ at one site, and at several taken together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NOTHING = float("nan")


@dataclass(frozen=True)
class SiteDiff:
    """One site: Frobenius norms of both changes and of their difference, the cosine of the angle between them.

    `outputs` and `inputs` are the overlaps of the column and of the row spaces, 0 to 1, and `chance_...` what random
    spaces of these dimensions overlap on average. NaN stands for what is not there: an adapter that does not act here,
    a method that has no such spaces. `rank_...` is 0 where a change is no product.
    """

    path: str
    role: str
    block: str
    size_a: float
    size_b: float
    difference: float = NOTHING
    cosine: float = NOTHING
    rank_a: int = 0
    rank_b: int = 0
    outputs: float = NOTHING
    inputs: float = NOTHING
    chance_outputs: float = NOTHING
    chance_inputs: float = NOTHING

    @property
    def shared(self) -> bool:
        """Whether both act here and could be compared."""
        return not math.isnan(self.difference)


def by_role(sites: Sequence[SiteDiff]) -> dict[str, list[SiteDiff]]:
    """The sites that both have, by role."""
    found: dict[str, list[SiteDiff]] = {}
    for site in sites:
        if site.shared:
            found.setdefault(site.role, []).append(site)
    return found


def root(sites: Sequence[SiteDiff], field: str) -> float:
    """Of the sum of the squares of a field."""
    return math.hypot(*(getattr(site, field) for site in sites))


def cosine(sites: Sequence[SiteDiff]) -> float:
    """Of the angle between both changes, all sites taken as one vector."""
    across = root(sites, "size_a") * root(sites, "size_b")
    known = [site.cosine * site.size_a * site.size_b for site in sites if not math.isnan(site.cosine)]
    return sum(known) / across if known else NOTHING


def mean(sites: Sequence[SiteDiff], field: str) -> float:
    """The mean of a field where it is known."""
    return average([getattr(site, field) for site in sites])


def average(values: Sequence[float]) -> float:
    """The mean of those that are not NaN; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NOTHING
