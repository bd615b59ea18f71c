"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters._contract import Factors, Tensors, Weight, WeightMethod, WeightSite, require
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
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank is {self.rank}; it must be at least 1.")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it is a probability, at least 0 and below 1.")

    @property
    def scale(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        lead = () if site.experts is None else (site.experts,)
        if site.role == "embedding":  # x is one-hot, and 1 / sqrt(n_in) would be next to nothing: B is drawn instead
            b = torch.empty(site.n_out, self.rank).uniform_(-1, 1) / math.sqrt(self.rank)
            return {"a": torch.zeros(self.rank, site.n_in), "b": b}
        # A as torch initialises a Linear: uniform within 1 / sqrt(n_in); the paper leaves the variance open
        bound = 1 / math.sqrt(site.n_in)
        a = torch.empty(*lead, self.rank, site.n_in).uniform_(-bound, bound)
        return {"a": a, "b": torch.zeros(*lead, site.n_out, self.rank)}

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        return torch.add(w, p["b"] @ p["a"], alpha=self.scale)

    def factors(self, p: Tensors) -> Factors:
        return Factors(p["b"], p["a"], self.scale)
