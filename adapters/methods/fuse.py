"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning (Pfeiffer et al., 2020, arXiv 2005.00247)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters._contract import FusionMethod, Site, StreamSite, Tensors, require
from adapters._registry import add


@add("fuse")
@dataclass(frozen=True)
class Fuse(FusionMethod):
    """AdapterFusion: y' = sum_i a_i V z_i, a = softmax_i((Q y + c) . K z_i), z_i = f_i(x, y) (section 3.2).

    Q, K, V (width, width), c (width): attention over what frozen adapters make of a branch's output y, position by
    position. V = I at start, so that a fresh fusion is a weighted mean of its parts; Q and K are drawn within
    1 / sqrt(width) / 10, c = 0. (A bias of the keys would add the same to every score.)

    Args:
        parts: the names of attached bottleneck adapters, or others that change streams.
    """

    def __post_init__(self) -> None:
        named = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)
        require(len(named) > 0, "a fusion has no parts: give parts=('a', 'b'), the names of attached adapters.")
        require(len(set(named)) == len(named), f"the parts {named} of a fusion name an adapter twice.")
        object.__setattr__(self, "parts", named)  # of a frozen dataclass

    def wants(self, site: Site) -> bool:
        return False  # it acts where its parts do

    def init(self, site: StreamSite) -> dict[str, Tensor]:
        bound = 0.1 / site.width**0.5
        return {
            "query": torch.empty(site.width, site.width).uniform_(-bound, bound),
            "query_bias": torch.zeros(site.width),
            "key": torch.empty(site.width, site.width).uniform_(-bound, bound),
            "value": torch.eye(site.width),
        }

    def fuse(self, y: Tensor, made: Tensor, p: Tensors) -> Tensor:
        query = y @ p["query"].mT + p["query_bias"]
        key = made @ p["key"].mT
        attention = torch.softmax((query * key).sum(-1), dim=0)  # (parts, ...)
        return (attention.unsqueeze(-1) * (made @ p["value"].mT)).sum(0)
