"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024, arXiv 2402.09353, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar, Self

import torch
from torch import Tensor

from adapters._contract import Scaled, Site, Tensors, Weight, WeightMethod, WeightSite
from adapters._registry import add
from adapters.methods.lora import LoRA, is_read


@add("dora")
@dataclass(frozen=True)
class DoRA(WeightMethod):
    """DoRA: W' = m (W + s B A) / ||W + s B A||, norms by row, m (n_out) trained; B = 0, m = ||W|| at start.

    A, B and s are LoRA's. The norm follows the weights but gets no gradient, as the paper's section 4.3 proposes. A
    weight that is read instead of called has no dropout.

    Args:
        rank, alpha, rslora, dropout, rank_pattern, alpha_pattern: as LoRA's.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    precise: ClassVar[frozenset[str]] = frozenset({"magnitude"})  # in 16 bits it would not be the base's norm

    def __post_init__(self) -> None:
        checked = self.lora()  # refuses bad values
        object.__setattr__(self, "rank_pattern", checked.rank_pattern)
        object.__setattr__(self, "alpha_pattern", checked.alpha_pattern)

    def lora(self) -> LoRA:
        """The low-rank part."""
        return LoRA(**vars(self))

    def at(self, site: Site) -> Self:
        lora = self.lora().at(site)
        dropout = 0.0 if is_read(site) else self.dropout
        return replace(self, rank=lora.rank, alpha=lora.alpha, dropout=dropout, rank_pattern={}, alpha_pattern={})

    def review(self, sites: Sequence[Site]) -> tuple[str, ...]:
        read = [site.path for site in sites if is_read(site)]
        notes = self.lora().review(sites)
        if not self.dropout or not read:
            return notes
        return (*notes, f"{len(read)} sites have no dropout, as their weight is read and not called, such as {read[0]}")

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        fresh = self.lora().init(site, w)
        return {**fresh, "magnitude": self._norms(w.dense(), fresh)}

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        changed = self.lora().weight(w, p)
        norms = torch.linalg.vector_norm(changed.detach(), dim=-1)  # no gradient through the norm
        return (p["magnitude"] / _nonzero(norms)).unsqueeze(-1) * changed

    def scaled(self, w: Weight, p: Tensors) -> Scaled:
        return Scaled(p["magnitude"] / _nonzero(self._norms(w.dense(), p)), self.lora().factors(p))

    @torch.no_grad()
    def _norms(self, w: Tensor, p: Tensors) -> Tensor:
        """||W + s B A|| by row, without the dense change: the root of ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B.

        ||W|| is taken out of the root and returned as it is where B = 0, so that a fresh adapter is the base exactly.
        """
        dtype: torch.dtype = reduce(torch.promote_types, (w.dtype, p["a"].dtype, p["b"].dtype), torch.float32)
        a, b, s = p["a"].to(w.device), p["b"].to(w.device, dtype), self.lora().scale
        norms: Tensor = torch.linalg.vector_norm(w, dim=-1, dtype=dtype)
        wide = dtype if w.device.type == "cpu" else w.dtype  # thin products in 16 bits take CPUs five times as long
        across = ((w.to(wide) @ a.to(wide).mT).to(dtype) * b).sum(-1)
        own = (b @ (a.to(dtype) @ a.to(dtype).mT) * b).sum(-1)
        change = 2 * s * across + s**2 * own
        tiny = norms < 1e-12  # whose squares underflow, and which no relative change describes
        relative = 1 + change / norms.masked_fill(tiny, 1).square()
        return torch.where(tiny, change.clamp(min=0).sqrt(), norms * relative.clamp(min=0).sqrt())


def _nonzero(norms: Tensor) -> Tensor:
    """A row of zeros stays one: its magnitude is 0, too."""
    return norms.masked_fill(norms == 0, 1)
