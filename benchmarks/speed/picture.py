"""How a step grows with tokens, rank and layers: ours beside the faster of TRL's padded and padding-free steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.speed.cases import Case, Rows, drawn
from benchmarks.speed.sides import sides
from benchmarks.speed.step import seconds
from benchmarks.twins import Setting

TOKENS, RANKS, LAYERS = (64, 128, 256, 512, 1024), (4, 16, 64, 128), (2, 4, 8, 16)
ROWS = 4


def draw(path: Path, console: Console) -> None:
    """Measures and draws; CPU seconds, the smallest of two steps after one."""
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (name, values) in zip(
        axes, (("tokens of a row", TOKENS), ("rank", RANKS), ("layers", LAYERS)), strict=True
    ):
        points = []
        for value in values:
            chosen = {"tokens of a row": 256, "rank": 16, "layers": 4} | {name: value}
            points.append(_measured(*chosen.values()))
            console.print(f"{name} {value}: {points[-1][0]:.2f} s beside {points[-1][1]:.2f} s")
        for label, times in zip(("adapters", "TRL + PEFT, fastest setting"), zip(*points, strict=True), strict=True):
            axis.plot(values, times, marker="o", label=label)
        axis.set(xlabel=name, ylabel="CPU s", xscale="log", ylim=0, xticks=values, xticklabels=values)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)


def _measured(tokens: int, rank: int, layers: int) -> tuple[float, float]:
    case = Case("growth", partial(drawn, partial(_config, layers)), partial(_rows, tokens), torch.float32, rank=rank)
    ours, theirs, _ = sides(case, Setting())
    times = []
    for side in (ours, *theirs):
        side.step()
        times.append(min(seconds(side.step) for _ in range(2)))
    return times[0], min(times[1:])


def _config(layers: int) -> Any:
    from transformers import Qwen3Config

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 8192}
    return Qwen3Config(num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, **sizes)


def _rows(tokens: int) -> Rows:
    """Rows of half to one and a half times the length, of which a quarter is learned."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for share in torch.linspace(0.5, 1.5, ROWS).tolist():
        ids = torch.randint(5, 8000, (round(tokens * share),), generator=generator).tolist()
        learned = len(ids) // 4
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) - learned) + ids[-learned:]})
    return made
