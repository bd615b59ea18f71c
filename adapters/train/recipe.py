"""What a recipe says: one frozen record, every key with its meaning, its default and the values it can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters._contract import Method

TASKS = ("function_calls", "sarcasm")
# keys that mean nothing for a task are refused rather than ignored
UNUSED: Mapping[str, tuple[str, ...]] = {
    "function_calls": (),
    "sarcasm": ("start", "evaluation.max_new_tokens"),
}


def _number(default: float, least: float) -> Any:
    return field(default=default, metadata={"least": least})


def _choice(default: str | None, *choices: str | None) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class Training:
    """How the adapter is trained. The token budget is fixed: `steps` times `batch` rows of at most `max_tokens`.

    Args:
        steps: optimizer steps.
        batch: rows in one step.
        micro_batch: rows in one forward; `batch` is a multiple of it.
        learning_rate: AdamW's, at its highest.
        warmup: steps in which the learning rate rises from 0.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        seed: of the fresh tensors and of the order of the rows.
        max_tokens: longer rows are left out.
        schedule: of the learning rate after the warm-up.
    """

    steps: int = _number(60, 1)
    batch: int = _number(6, 1)
    micro_batch: int = _number(3, 1)
    learning_rate: float = _number(1e-3, 0)
    warmup: int = _number(5, 0)
    weight_decay: float = _number(0.0, 0)
    clip: float = _number(1.0, 0)
    seed: int = _number(0, 0)
    max_tokens: int = _number(220, 8)
    schedule: str = _choice("cosine", "cosine", "linear", "constant")


@dataclass(frozen=True)
class Evaluation:
    """How base and adapted model are compared on rows that training never saw.

    Args:
        rows: held-out rows.
        batch: rows answered at a time.
        max_new_tokens: longest answer, in tokens.
        examples: rows whose answers are printed, and compared after loading into a fresh base.
    """

    rows: int = _number(80, 1)
    batch: int = _number(10, 1)
    max_new_tokens: int = _number(96, 1)
    examples: int = _number(3, 1)


@dataclass(frozen=True)
class Recipe:
    """A complete run.

    Args:
        task: what is learned and how it is scored.
        base: an embedded name, a Hub id or a folder.
        method: the adapter, checked when the recipe is read.
        quantize: "nf4" trains on a base in 4 bits.
        dtype: of the base; by default the checkpoint's.
        start: "example" starts a method that has a `text` from one worked example of the task.
        targets: where the adapter acts, instead of the method's own choice.
        output: folder of the adapter; `{method}` in it is replaced by the method's name.
    """

    task: str = _choice("function_calls", *TASKS)
    base: str = "smollm2-135m-instruct"
    method: Method = field(default_factory=Method)
    quantize: str | None = _choice(None, None, "nf4")
    dtype: str | None = _choice(None, None, "bfloat16", "float16", "float32")
    start: str | None = _choice(None, None, "example")
    targets: tuple[str, ...] | None = None
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: str = "out/{method}"
