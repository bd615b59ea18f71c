"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from adapters._contract import Factors, Site, Tensors, Weight, WeightMethod, WeightSite, require
from adapters._patterns import checked, require_matches, value_at
from adapters._registry import add


@add("lora")
@dataclass(frozen=True)
class LoRA(WeightMethod):
    """LoRA: W' = W + s B A, A (rank, n_in), B (n_out, rank), s = alpha / rank, B = 0 at start.

    Args:
        rank: inner dimension of the product, in units; the larger, the more can be learned and the larger the file.
        alpha: numerator of the scale `s`.
        rslora: s = alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski, 2023, arXiv 2312.03732), stable at large ranks.
        dropout: probability with which elements of the input of A are zeroed in training.
        bias: b' = b + s e, e (n_out) trained beside B, 0 at start. A layer that has no bias then gets one while the
            adapter acts, and cannot be merged; a weight that is read instead of called gets none.
        rank_pattern: other ranks, by what `targets` accepts: {"mlp.*": 4}; the first key that matches a site holds.
        alpha_pattern: other alphas, likewise.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank is {self.rank}; it must be at least 1.")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it is a probability, at least 0 and below 1.")
        # a frozen dataclass keeps its own copy: the caller's mapping may change; an empty one costs nothing here
        if self.rank_pattern != {}:
            ranks = checked("rank_pattern", self.rank_pattern, _is_rank, "a whole number, at least 1")
            object.__setattr__(self, "rank_pattern", ranks)
        if self.alpha_pattern != {}:
            alphas = checked("alpha_pattern", self.alpha_pattern, _is_number, "a number")
            object.__setattr__(self, "alpha_pattern", alphas)

    @property
    def scale(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at(self, site: Site) -> Self:
        return replace(
            self,
            rank=value_at(self.rank_pattern, site, self.rank),
            alpha=value_at(self.alpha_pattern, site, self.alpha),
            bias=self.bias and not is_read(site),
            rank_pattern={},
            alpha_pattern={},
        )

    def review(self, sites: Sequence[Site]) -> tuple[str, ...]:
        require_matches("rank_pattern", self.rank_pattern, sites)
        require_matches("alpha_pattern", self.alpha_pattern, sites)
        read = [site.path for site in sites if is_read(site)]
        if not self.bias or not read:
            return ()
        return (f"{len(read)} sites train no bias, as their weight is read and not called, such as {read[0]}",)

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        lead = () if site.experts is None else (site.experts,)
        if site.role == "embedding":  # x is one-hot, and 1 / sqrt(n_in) would be next to nothing: B is drawn instead
            b = torch.empty(site.n_out, self.rank).uniform_(-1, 1) / math.sqrt(self.rank)
            return {"a": torch.zeros(self.rank, site.n_in), "b": b}
        # A as torch initialises a Linear: uniform within 1 / sqrt(n_in); the paper leaves the variance open
        bound = 1 / math.sqrt(site.n_in)
        a = torch.empty(*lead, self.rank, site.n_in).uniform_(-bound, bound)
        fresh = {"a": a, "b": torch.zeros(*lead, site.n_out, self.rank)}
        return {**fresh, "bias": torch.zeros(site.n_out)} if self.bias else fresh

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        return torch.add(w, p["b"] @ p["a"], alpha=self.scale)

    def offset(self, b: Tensor | None, p: Tensors) -> Tensor | None:
        if not self.bias:
            return b
        return self.scale * p["bias"] if b is None else torch.add(b, p["bias"], alpha=self.scale)

    def factors(self, p: Tensors) -> Factors:
        return Factors(p["b"], p["a"], self.scale, p.get("bias"))


def is_read(site: Site) -> bool:
    """Whether other code reads the weight, so that what goes into the product is out of reach."""
    return isinstance(site, WeightSite) and site.access == "read"


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
