"""One page that shows how two adapters differ: heat maps of roles by layers, and sizes by layer."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from adapters._algebra.measures import SiteDiff, average, by_role, mean
from adapters._whole import write_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart: jfly.uni-koeln.de/color
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
WRITTEN = 60  # cells of a map up to which each has its number


def draw(title: str, sites: Sequence[SiteDiff], path: str | os.PathLike[str]) -> Path:
    """Writes the page as a PNG, whole or not at all; equal input gives equal bytes."""
    with style.context("default"):  # whatever the user's own style is
        canvas, drawn = FigureCanvasAgg(figure(title, sites)), io.BytesIO()
        canvas.print_png(drawn, metadata={"Software": None})  # which would be matplotlib's version
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, drawn.getvalue())
    return target


def figure(title: str, sites: Sequence[SiteDiff]) -> Figure:
    """The page as a figure, to be drawn elsewhere."""
    made = Figure(figsize=(13, 9), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    (angle, sizes), (outputs, inputs) = made.subplots(2, 2)
    made.suptitle(title, fontsize=12)
    roles = list(by_role(sites))
    blocks = list(dict.fromkeys(site.block for site in sites if site.shared))
    _map(angle, "Cosine of the angle between a and b", sites, roles, blocks, "cosine", ("RdBu", -1.0, 1.0))
    for axes, field, what in (
        (outputs, "outputs", "changes in the outputs"),
        (inputs, "inputs", "is read of the inputs"),
    ):
        by_chance = mean(sites, f"chance_{field}")
        title = f"Overlap of what {what}" + ("" if math.isnan(by_chance) else f" (by chance {by_chance:.2f})")
        _map(axes, title, sites, roles, blocks, field, ("cividis", 0.0, 1.0))
    _sizes(sizes, sites, blocks)
    return made


def layers(blocks: Sequence[str]) -> list[str]:
    """Layers by their number where that tells them apart; `-` outside of all layers."""
    short = [block.rpartition(".")[2] or "-" for block in blocks]
    return short if len(set(short)) == len(short) else [block or "-" for block in blocks]


def _map(
    axes: Axes,
    title: str,
    sites: Sequence[SiteDiff],
    roles: Sequence[str],
    blocks: Sequence[str],
    field: str,
    scale: tuple[str, float, float],
) -> None:
    axes.set_title(title, loc="left")
    cells: dict[tuple[str, str], list[float]] = {}
    for site in sites:
        if site.shared and not math.isnan(value := getattr(site, field)):
            cells.setdefault((site.role, site.block), []).append(value)
    if not cells:
        axes.text(0.5, 0.5, "these methods have none", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    table = [[average(cells.get((role, block), [])) for block in blocks] for role in roles]
    colours, low, high = scale
    axes.set_facecolor("#E5E5E5")
    image: Any = axes.imshow(table, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(len(roles)), roles)
    _ticks(axes, blocks)
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    if len(roles) * len(blocks) > WRITTEN:
        return
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            if math.isfinite(value):
                r, g, b, _ = image.to_rgba([value])[0]
                ink = "black" if 0.3 * r + 0.59 * g + 0.11 * b > 0.5 else "white"
                axes.text(
                    j, i, f"{value + 0.0:.2f}".replace("-0.00", "0.00"), ha="center", va="center", color=ink, fontsize=8
                )


def _sizes(axes: Axes, sites: Sequence[SiteDiff], blocks: Sequence[str]) -> None:
    axes.set_title("Size by layer (Frobenius norm)", loc="left")
    lines = (("size_a", "a", BLUE, "o"), ("size_b", "b", ORANGE, "s"), ("difference", "a - b", BLACK, ""))
    for field, label, colour, marker in lines:
        held = [[getattr(s, field) for s in sites if s.shared and s.block == block] for block in blocks]
        axes.plot(range(len(blocks)), [math.hypot(*each) for each in held], color=colour, marker=marker, label=label)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.grid(True, color="#E5E5E5", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3)
    _ticks(axes, blocks)
    axes.set_xlabel("layer")


def _ticks(axes: Axes, blocks: Sequence[str]) -> None:
    names = layers(blocks)
    step = max(1, math.ceil(len(names) * max(map(len, names)) / 40))
    shown = range(0, len(names), step)
    axes.set_xticks(shown, [names[i] for i in shown])
    axes.set_xlabel("layer (grey: no site there that both have)")
