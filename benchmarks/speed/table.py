"""RESULTS.md of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.step import Measured

PREFACE = """
A step is collating, forward, loss, backward and AdamW, as the trainers make it, on one thread: LoRA of rank 16 on every
linear layer but the head, one micro-batch. Ours is `adapters.train.SFTTrainer` as it comes. The peer is TRL's
SFTTrainer with PEFT's model, the same rows in the same order and the same tensors, without activation checkpointing and
autocast, under whichever of its settings was fastest in the same run: padded or padding-free, and with the head on all
tokens or, by a switch inside TRL that only Triton devices flip, on labelled tokens alone. Times are CPU seconds,
medians of interleaved pairs; `x` is the median of the pairs' ratios. Over ours, too: `settable`, the fastest of TRL's
steps without that switch, and `defaults`, the step of `SFTConfig(folder)`. The floor is the time of the base's own
matrix products of the step with nothing between them, as a share of ours. Losses and gradient norms are those of the
first step; `gradient` is the norm of the difference of all gradients over the peer's. Saved are MiB that autograd
keeps, peak MiB of all tensors alive. The classifier is trained by transformers' Trainer on both sides, on padded
batches, ours after `adapters.train.unpad(model)`.
"""
PICTURE = "growth.png"
HEADS = ("case", "ours s", "peer s", "x", "min", "max", "fastest peer", "settable", "defaults", "floor")
MORE = (
    "case",
    "loss",
    "peer's",
    "norm",
    "peer's",
    "gradient",
    "saved MiB",
    "peak MiB",
    "operators",
    "our tokens in head",
)


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The whole of RESULTS.md, from what `results.json` holds of each case."""
    found = [Measured(**{key: value for key, value in record.items() if key != "about"}) for record in records]
    made = {", ".join(f"{k} {v}" for k, v in record["about"].items() if k != "seconds"): None for record in records}
    parts = [
        "# Steps beside TRL and PEFT",
        PREFACE.strip(),
        f"Made by `python -m benchmarks.speed`: {'; '.join(made)}.",
    ]
    parts.append(_table(HEADS, [_times(each) for each in found]))
    parts.append(_table(MORE, [_numbers(each) for each in found]))
    parts.append("What fills a step of ours: operators, with their shares of its CPU time. `mm` is the floor and LoRA.")
    parts.append(_table(("case", "operators"), [[each.case, _shares(each.profile)] for each in found]))
    if Path(__file__).with_name(PICTURE).is_file():
        parts.append(f"How a step grows, with a small Qwen3 of random weights:\n\n![growth]({PICTURE})")
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shares(profile: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in profile.items())


def _times(each: Measured) -> list[str]:
    default = "" if each.default is None else f"{each.default / each.ours:.2f}"
    spread = [f"{value:.2f}" for value in (each.ratio, min(each.ratios), max(each.ratios))]
    times = [f"{each.ours:.2f}", f"{each.theirs:.2f}"]
    settable = f"{each.settable / each.ours:.2f}"
    return [each.case, *times, *spread, each.peer, settable, default, f"{each.floor / each.ours:.0%}"]


def _numbers(each: Measured) -> list[str]:
    (loss, its_loss), (norm, its_norm) = each.losses, each.norms
    pairs = [f"{a:,.0f} / {b:,.0f}" for a, b in (each.saved, each.peak, each.ops)]
    # TRL multiplies tiles of the head's weight, which cannot be told by their shape
    pairs.append(f"{each.head[0]:,}" if each.head[0] else "")
    exact = [f"{loss:.6f}", f"{its_loss:.6f}", f"{norm:.5g}", f"{its_norm:.5g}", f"{each.gradient:.0e}"]
    return [each.case, *exact, *pairs]
