"""One picture of a run: loss, learning rate, how far each layer moved, and what the rows held."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor, nn

from adapters._whole import write_whole
from adapters.data.tokens import IGNORED
from adapters.train.weight_change import Change, by_layer, weight_changes

NAME = "training.png"
# Okabe and Ito's palette, which colour-blind readers can tell apart: jfly.uni-koeln.de/color
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
EVALUATIONS = (ORANGE, GREEN, "#CC79A7", "#E69F00")
SMOOTHED = 100  # logged losses from which a running mean is drawn as well
WRITTEN = 40  # cells of the map of layers up to which each has its number
Counts = tuple[Sequence[int], Sequence[int]]


def draw(
    folder: str | os.PathLike[str],
    history: Sequence[Mapping[str, Any]],
    model: nn.Module | None = None,
    before: Mapping[str, Tensor] | None = None,
    data: Any = None,
    name: str | None = None,
) -> Path:
    """Writes `training.png` into `folder`, whole or not at all; equal input gives equal bytes.

    Args:
        folder: of the adapter; it is made if it is not there.
        history: `trainer.state.log_history`.
        model: the trained model, for how far each layer moved.
        before: from `weight_change.start_of`, before training: needed for adapters that do not change weights.
        data: tokens of each row and how many of them are learned, as two sequences or the attributes `lengths` and
            `learned`; see `token_counts`.
        name: the adapter; None takes what acts.

    Returns:
        The path of the picture.

    Raises:
        AdapterError: there is no adapter of that name.
        OSError: the folder cannot be written to.
    """
    changes = weight_changes(model, before, name) if model is not None else ()
    with style.context("default"):  # whatever the user's own style is
        canvas = FigureCanvasAgg(figure(history, changes, data))
        target = Path(folder) / NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        canvas.print_png(drawn, metadata={"Software": None})  # which would be matplotlib's version
        write_whole(target, drawn.getvalue())
    return target


def token_counts(rows: Iterable[Mapping[str, Any]]) -> Counts:
    """The length of each row of `input_ids` and `labels`, in tokens, and how many of its labels are learned."""
    pairs = [(len(row["input_ids"]), sum(int(label) != IGNORED for label in row["labels"])) for row in rows]
    return [length for length, _ in pairs], [learned for _, learned in pairs]


def figure(history: Sequence[Mapping[str, Any]], changes: Sequence[Change] = (), data: Any = None) -> Figure:
    """The picture as a figure, to be drawn elsewhere."""
    made = Figure(figsize=(12.5, 8.5), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    (loss, rate), (layers, rows) = made.subplots(2, 2)
    _draw_loss(loss, history)
    _draw_rate(rate, history)
    _draw_layers(layers, changes)
    _draw_rows(rows, data)
    return made


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity; what is not finite is a gap."""
    logged = [(int(entry["step"]), float(entry[key])) for entry in history if key in entry and "step" in entry]
    return [step for step, _ in logged], [value if math.isfinite(value) else math.nan for _, value in logged]


def _draw_loss(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    _titled(axes, "Loss", "optimizer step", "loss (nats)")
    steps, values = series(history, "loss")
    keys = sorted({key for entry in history for key in entry if re.fullmatch(r"eval_(.+_)?loss", key)})
    if not steps and not keys:
        _empty(axes, "no loss was logged")
        return
    if len(steps) > SMOOTHED:
        axes.plot(steps, values, color=BLUE, lw=0.8, alpha=0.35, label="training")
        window = len(steps) // 30
        axes.plot(steps, running_mean(values, window), color=BLUE, lw=1.8, label=f"mean of {window} logs")
    elif steps:
        axes.plot(steps, values, color=BLUE, lw=1.6, marker=_marker("o", steps), ms=3.5, label="training")
    for key, colour in zip(keys, EVALUATIONS * len(keys), strict=False):
        evaluated, losses = series(history, key)
        label = f"evaluation {key[5:-5]}".strip()
        axes.plot(evaluated, losses, color=colour, lw=1.6, marker=_marker("s", evaluated), ms=5, ls="--", label=label)
    _legend(axes)
    axes.margins(x=0.02)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the `window - 1` before it, as far as there are so many; gaps are left out."""
    means = []
    for i in range(len(values)):
        kept = [value for value in values[max(0, i - window + 1) : i + 1] if math.isfinite(value)]
        means.append(sum(kept) / len(kept) if kept else math.nan)
    return means


def _draw_rate(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    _titled(axes, "Learning rate", "optimizer step", "learning rate")
    steps, values = series(history, "learning_rate")
    if not steps:
        _empty(axes, "no learning rate was logged")
        return
    axes.plot(steps, values, color=BLUE, lw=1.6, marker=_marker("o", steps), ms=3.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)


def _draw_layers(axes: Axes, changes: Sequence[Change]) -> None:
    _titled(axes, "Change per layer", "layer", "")
    if all(math.isnan(change.relative) for change in changes):
        _empty(axes, "not measured: give the model, and `before`\nwhere the adapter does not change weights")
        return
    axes.grid(False)
    roles, layers, table = by_layer(changes)
    percent = [[100 * value for value in row] for row in table]
    axes.set_facecolor("#E5E5E5")
    if any(math.isnan(value) for row in percent for value in row):
        axes.set_xlabel("layer (grey: no site there, or not measured)")
    largest = max((value for row in percent for value in row if math.isfinite(value)), default=0.0) or 1.0
    image = axes.imshow(percent, aspect="auto", cmap="cividis", vmin=0, vmax=largest, interpolation="nearest")
    axes.set_yticks(range(len(roles)), roles)
    shown = range(0, len(layers), max(1, math.ceil(len(layers) * max(map(len, layers)) / 40)))
    axes.set_xticks(shown, [layers[i] for i in shown])
    axes.figure.colorbar(image, ax=axes, label="norm of the change / norm of the original (%)", fraction=0.05, pad=0.02)
    if len(roles) * len(layers) > WRITTEN:
        return
    for i, row in enumerate(percent):
        for j, value in enumerate(row):
            if math.isfinite(value):
                colour = "black" if value > 0.55 * largest else "white"
                axes.text(j, i, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=9)


def _draw_rows(axes: Axes, data: Any) -> None:
    _titled(axes, "Rows", "tokens in a row", "rows")
    if data is None:
        _empty(axes, "not counted: give the rows' tokens")
        return
    lengths, learned = data if isinstance(data, tuple) else (data.lengths, data.learned)
    if not lengths:
        _empty(axes, "there are no rows")
        return
    top = max(lengths) + 1
    width = max(1, math.ceil(top / 30))
    edges = list(range(0, top + width, width))
    axes.hist(lengths, bins=edges, color=GREY, label=f"all tokens: {_short(sum(lengths))}")
    share = f"learned: {_short(sum(learned))} ({100 * sum(learned) / max(1, sum(lengths)):.1f} %)"
    axes.hist(learned, bins=edges, histtype="step", color=BLUE, lw=1.8, label=share)
    axes.set_ylabel(f"rows (of {len(lengths):,})")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    axes.margins(x=0.02)


def _titled(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#E5E5E5", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)


def _marker(shape: str, steps: Sequence[int]) -> str:
    return shape if len(steps) < 30 else ""


def _short(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _legend(axes: Axes) -> None:
    """Above the axes, where it cannot lie on what is drawn, as long as there is room."""
    if len(axes.get_legend_handles_labels()[1]) > 3:
        axes.legend(frameon=False, fontsize=9)
        return
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.2, fontsize=9)


def _empty(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color="#666666")
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes.grid(False)
