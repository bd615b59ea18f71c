"""A third party's method: LoHa (Hyeon-Woo et al., 2021, arXiv 2108.06098, section 2.2), in one file."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import Weight, WeightMethod, WeightSite


@dataclass(frozen=True)
class LoHa(WeightMethod):
    """LoHa: W' = W + s (B1 A1) * (B2 A2), elementwise product, s = alpha / rank, B2 = 0 at start."""

    rank: int = 4
    alpha: float = 4.0

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        lead = () if site.experts is None else (site.experts,)
        small = {"a1": (self.rank, site.n_in), "b1": (site.n_out, self.rank), "a2": (self.rank, site.n_in)}
        p = {name: 0.1 * torch.randn(*lead, *shape) for name, shape in small.items()}
        return {**p, "b2": torch.zeros(*lead, site.n_out, self.rank)}

    def weight(self, w: Tensor, p: dict[str, Tensor]) -> Tensor:
        return w + self.alpha / self.rank * (p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"])
