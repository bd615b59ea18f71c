"""What combining, resizing and extracting return: what was made, and how far it is from what was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 5  # weights that moved and are not covered


@dataclass(frozen=True)
class Approximation:
    """One site: `size` is the Frobenius norm of the change wanted, `error` the distance of the one stored from it,
    relative to `size`, and `rank` the rank stored."""

    path: str
    role: str
    block: str
    rank: int
    size: float
    error: float


@dataclass(frozen=True)
class CombineReport:
    """A new adapter out of others. `sites` is empty where tensors were joined, and no change of a weight compared."""

    name: str
    method: str
    weights: Mapping[str, float]
    settings: Mapping[str, Any]
    sites: tuple[Approximation, ...]
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The distance of all that is stored from all that was wanted, relative to the latter."""
        return _together(self.sites)

    def __str__(self) -> str:
        terms = " + ".join(f"{weight:g} {label!r}" for label, weight in self.weights.items()).replace("+ -", "- ")
        how = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        lines = [f"{self.name!r} = {terms} ({how}): a {self.method} of {self.parameters:,} parameters"]
        return "\n".join([*lines, *_errors(self.sites), *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class ResizeReport:
    """An adapter at another rank; `before` are the ranks that it had."""

    name: str
    rank: int
    before: tuple[int, ...]
    sites: tuple[Approximation, ...]
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The distance of the new change from the old, relative to the latter."""
        return _together(self.sites)

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.before))
        lines = [f"{self.name!r} has rank {self.rank} instead of {ranks}: {self.parameters:,} parameters"]
        return "\n".join([*lines, *_errors(self.sites), *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class LeftOut:
    """A parameter that moved and that the adapter does not cover: the norm of its move, and relative to its own."""

    path: str
    moved: float
    relative: float


@dataclass(frozen=True)
class ExtractReport:
    """A fine-tuned model as an adapter: what it holds of the change of the weights, and what it leaves out."""

    name: str
    rank: int
    sites: tuple[Approximation, ...]
    left: tuple[LeftOut, ...]
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The distance of what is stored from the change of the weights at its sites, relative to the latter."""
        return _together(self.sites)

    @property
    def explained(self) -> float:
        """The share of the squared norm of the change that is stored, of the sites and of what is left out."""
        lost = sum((site.error * site.size) ** 2 for site in self.sites)
        outside = sum(left.moved**2 for left in self.left if math.isfinite(left.moved))
        whole = sum(site.size**2 for site in self.sites) + outside
        return 1 - (lost + outside) / whole if whole else 1.0

    def __str__(self) -> str:
        lines = [
            f"extracted {self.name!r} at rank {self.rank}: {self.parameters:,} parameters at {len(self.sites)} sites, "
            f"{100 * self.explained:.4g} % of the squared change of all weights",
            *_errors(self.sites),
        ]
        largest = sorted(self.left, key=lambda left: -left.moved if math.isfinite(left.moved) else -math.inf)
        if self.left:
            lines.append(f"  left out: {len(self.left)} parameters that moved")
        lines += [f"    {each.path:<60} by {each.moved:.3g} ({100 * each.relative:.2g} %)" for each in largest[:SHOWN]]
        lines += [f"    and {len(largest) - SHOWN} more"] if len(largest) > SHOWN else []
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _errors(sites: Iterable[Approximation]) -> list[str]:
    found = list(sites)
    if not found:
        return []
    worst, ranks = max(found, key=lambda site: site.error), sorted({site.rank for site in found})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return [
        f"  {len(found)} sites, rank {shown}; error {_together(found):.2g}, at most {worst.error:.2g} at {worst.path}"
    ]


def _together(sites: Iterable[Approximation]) -> float:
    held = [(site.size, site.error * site.size if site.size else 0.0) for site in sites]
    size = math.hypot(*(each for each, _ in held))
    return math.hypot(*(lost for _, lost in held)) / size if size else 0.0
