"""What comparing two adapters returns, and how it is printed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters._algebra.measures import SiteDiff, by_role, cosine, mean, root
from adapters._errors import AdapterError

HEADER = ("site", "|a|", "|b|", "|a-b|", "cosine", "outputs", "inputs")


@dataclass(frozen=True)
class DiffReport:
    """Two adapters, `a` and `b`, site by site. Totals are over the sites that both have; overlaps are means."""

    a: str
    b: str
    method_a: str
    method_b: str
    sites: tuple[SiteDiff, ...]
    notes: tuple[str, ...] = ()

    @property
    def size_a(self) -> float:
        return root(self._shared, "size_a")

    @property
    def size_b(self) -> float:
        return root(self._shared, "size_b")

    @property
    def difference(self) -> float:
        return root(self._shared, "difference")

    @property
    def cosine(self) -> float:
        """Of the angle between both changes, all sites taken as one vector."""
        return cosine(self._shared)

    @property
    def outputs(self) -> float:
        return mean(self._shared, "outputs")

    @property
    def inputs(self) -> float:
        return mean(self._shared, "inputs")

    @property
    def _shared(self) -> list[SiteDiff]:
        return [site for site in self.sites if site.shared]

    def save_picture(self, path: str | os.PathLike[str]) -> Path:
        """Writes a page of heat maps, role by layer (cosine, overlaps), and the sizes by layer, as a PNG.

        Raises:
            AdapterError: matplotlib is not installed, or the sites have nothing to draw.
        """
        try:
            from adapters._algebra.picture import draw
        except ImportError as error:
            raise AdapterError("a picture needs matplotlib: pip install matplotlib.") from error
        return draw(f"a = {self.a} ({self.method_a})    b = {self.b} ({self.method_b})", self.sites, path)

    def __str__(self) -> str:
        rows = [_row(site.path.removesuffix(".weight"), [site]) for site in self.sites]
        sums = [_row(role, sites) for role, sites in by_role(self.sites).items()]
        total = _row(f"all {len(self._shared)} shared sites", self._shared)
        shown = [HEADER, *rows, ("",) * len(HEADER), *sums, total]
        widths = [max(len(row[i]) for row in shown) for i in range(len(HEADER))]
        lines = [_line(row, widths) for row in shown]
        chances = mean(self._shared, "chance_outputs"), mean(self._shared, "chance_inputs")
        legend = f"a = {self.a!r} ({self.method_a}), b = {self.b!r} ({self.method_b})"
        told = f"; random spaces would overlap by {chances[0]:.3f} and {chances[1]:.3f}"
        tail = ["overlaps are of column (outputs) and row spaces (inputs)" + ("" if math.isnan(chances[0]) else told)]
        alone = len(self.sites) - len(self._shared)
        tail += [f"{alone} sites are in one of them only, or cannot be compared"] if alone else []
        return "\n".join([legend, *lines, *tail, *(f"note: {note}" for note in self.notes)])


def _row(name: str, sites: Sequence[SiteDiff]) -> tuple[str, ...]:
    sizes = [root(sites, field) for field in ("size_a", "size_b", "difference")]
    shares = [cosine(sites), mean(sites, "outputs"), mean(sites, "inputs")]
    return (name, *(f"{value:.4g}" for value in sizes), *(f"{value:.3f}" for value in shares))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = ["-" if cell == "nan" else cell for cell in row]
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()
