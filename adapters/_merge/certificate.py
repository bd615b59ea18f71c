"""What a merge did, and how far the merged model is from the adapted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters._errors import AdapterError

# Relative error of the outputs above which a merge is refused. Rounding alone makes some of it: on the 30 layers of
# SmolLM2-135M in bfloat16 two equal computations differ by 1.5e-2, a merged adapter that moves the outputs by 4 % by
# 1.7e-2, and one that moves them by 37 % by 3.0e-2. A merge that lost its adapter differs by as much as that moves.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
# The same beside a base in 8 bits, which rounds activations to 8 bits too, as the merged model does not. On
# SmolLM2-135M-Instruct in bfloat16 that alone moves the base's outputs by 7.6e-2 on a text of 35 tokens (1.2e-1 with
# no columns of outliers left in 16 bits), and merged adapters of seven sizes differ from the adapted model by 3.1e-2 to
# 1.2e-1. A merge beside such a base is held to `TOLERANCE` with that rounding left out.
ROUNDED_ACTIVATIONS = 0.2
LOST = 0.25  # of an adapter's effect, above which a certificate speaks of it


@dataclass(frozen=True)
class SiteError:
    """One merged weight. `predicted`: the rounding |stored - exact| / |exact| of its elements. `seen`: the difference
    of the site's outputs on real inputs, relative; None for weights that are read, not called."""

    path: str
    predicted: float
    seen: float | None


@dataclass(frozen=True)
class PromptError:
    """A real prompt answered by the adapted and by the merged model, greedily.

    Args:
        error: |merged - adapted| / |adapted| of the logits on the prompt and the adapted model's answer.
        tokens: of that answer; `agreed` of them, from the first, are the merged model's too.
        margin: between the two likeliest tokens where the answers part, in the adapted model's logits; None: nowhere.
    """

    prompt: str
    adapted: str
    merged: str
    error: float
    tokens: int
    agreed: int
    margin: float | None = None

    def __str__(self) -> str:
        said = f"{self.prompt!r}: logits differ by {self.error:.1e}"
        if self.margin is None:
            return f"{said}, the same {self.tokens} tokens"
        return (
            f"{said}, {self.agreed} of {self.tokens} tokens alike, then a choice between two that are "
            f"{self.margin:.2g} apart"
        )


@dataclass(frozen=True)
class Certificate:
    """`error` = |merged - adapted| / |adapted| of the output that differs most; `effect`: |adapted - base| likewise.

    `prompts`: what both models answer to real prompts.
    """

    name: str
    path: str  # how: "in place in float32", "dequantised from nf4 to bfloat16, then merged", ...
    error: float
    effect: float
    tolerance: float
    sites: tuple[SiteError, ...]
    notes: tuple[str, ...] = ()
    prompts: tuple[PromptError, ...] = ()

    @property
    def worst(self) -> SiteError:
        return max(self.sites, key=lambda site: max(site.predicted, site.seen or 0.0))

    def __str__(self) -> str:
        lost = self.error / self.effect if self.effect else float("inf")
        worst = self.worst
        lines = [
            f"merged {self.name!r} into {len(self.sites)} weights, {self.path}",
            f"  outputs differ from the adapted model's by {self.error:.1e} (tolerance {self.tolerance:.0e}),"
            f" {100 * lost:.2g} % of what the adapter does",
            f"  worst weight: {worst.path}, predicted {worst.predicted:.1e}"
            + (f", seen {worst.seen:.1e}" if worst.seen is not None else ""),
        ]
        lines += [f"  prompt {prompt}" for prompt in self.prompts]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def usual_limit(dtype: torch.dtype) -> float:
    """What a merge of this dtype is held to where nobody says otherwise."""
    return TOLERANCE.get(dtype, 5e-2)


def require_near(name: str, error: float, prompts: Sequence[PromptError], limit: float) -> None:
    """Refuses a merge that changes outputs, or the logits of a prompt, by more than the limit; NaN is more."""
    places = [("the outputs", error), *((f"the logits of {each.prompt!r}", each.error) for each in prompts)]
    for where, found in places:
        if not found <= limit:
            raise AdapterError(
                f"merging {name!r} changes {where} by {found:.1e}, more than the tolerance of {limit:.0e}: keep it "
                "unmerged, merge into a base of higher precision, or pass tolerance=."
            )


def of_little_effect(error: float, effect: float, dtype: torch.dtype) -> list[str]:
    """What to say of a merge that is as exact as the dtype allows, where the adapter itself does hardly more."""
    if not effect or error <= LOST * effect:
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"{100 * error / effect:.0f} % of what the adapter does here is below what {name} can hold: on these inputs it "
        f"changes the outputs by {effect:.1e}. A base of higher precision keeps it"
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in fp32; 0 where both are 0."""
    difference, size = (found.float() - expected.float()).norm().item(), expected.float().norm().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
