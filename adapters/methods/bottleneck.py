"""Bottleneck adapter layers, in three placements.

Houlsby et al., 2019, arXiv 1902.00751, section 2.1: after both sub-layers. Pfeiffer et al., 2020, arXiv 2005.00247,
section 3.2: after the feed-forward only. He et al., 2021, arXiv 2110.04366, section 4: parallel to the feed-forward,
scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters._contract import Site, StreamMethod, StreamSite, Tensors, require
from adapters._registry import add

Placement = Literal["pfeiffer", "houlsby", "parallel"]
Reads = Literal["branch", "sum", "normed"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@add("bottleneck")
@dataclass(frozen=True)
class Bottleneck(StreamMethod):
    """Bottleneck: y' = y + s (U f(D h + c) + e), h = y, or h = x when parallel; U = 0, c = 0, e = 0 at start.

    D (width / reduction_factor, width), U (width, width / reduction_factor), y what a branch adds to the residual
    stream, x what the branch read from it. Where it reads the sum, h = y + x, and h = n(y + x) where it reads that
    normed, n(z) = (z - mean(z)) / sqrt(var(z) + eps): a norm's own weights are a part of D and c.

    Args:
        placement: "houlsby" after attention and feed-forward, "pfeiffer" after the feed-forward, "parallel" beside it.
        reduction_factor: width of the stream divided by the width of the bottleneck, rounded down, at least 1 unit.
        activation: f, one of relu, gelu, silu, tanh.
        scale: s; He et al. use 4 for the parallel placement.
        reads: "branch", the h of the placement; "sum" or "normed", as AdapterHub's layers do after Pfeiffer et al.: in
            post-norm models x is the residual stream itself, and so the sum what the block's norm is given.
        eps: of n.
    """

    placement: Placement = "pfeiffer"
    reduction_factor: float = 16.0
    activation: Activation = "relu"
    scale: float = 1.0
    reads: Reads = "branch"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        choices = {"placement": get_args(Placement), "activation": tuple(_ACTIVATIONS), "reads": get_args(Reads)}
        for field, known in choices.items():
            found = getattr(self, field)
            require(found in known, f"{field} is {found!r}; it must be one of {', '.join(known)}.")
        alone = self.placement != "parallel" or self.reads == "branch"
        require(alone, f"reads is {self.reads!r}, and a parallel bottleneck reads the branch's input.")
        require(self.reduction_factor > 0, f"reduction_factor is {self.reduction_factor}; it must be above 0.")

    def wants(self, site: Site) -> bool:
        feed_forward = isinstance(site, StreamSite) and site.branch != "attention"
        return site.default and (feed_forward or self.placement == "houlsby")

    def reads_input(self) -> bool:
        return self.placement == "parallel" or self.reads != "branch"

    def init(self, site: StreamSite) -> dict[str, Tensor]:
        width = max(1, int(site.width / self.reduction_factor))
        bound = 1 / site.width**0.5
        return {
            "down": torch.empty(width, site.width).uniform_(-bound, bound),
            "down_bias": torch.zeros(width),
            "up": torch.zeros(site.width, width),
            "up_bias": torch.zeros(site.width),
        }

    def stream(self, x: Tensor | None, y: Tensor, p: Tensors) -> Tensor:
        h = y if x is None else x if self.reads == "branch" else y + x
        if self.reads == "normed":
            h = F.layer_norm(h, h.shape[-1:], eps=self.eps)
        inner = _ACTIVATIONS[self.activation](_linear(h, p["down"], p["down_bias"]))
        return torch.add(y, _linear(inner, p["up"], p["up_bias"]), alpha=self.scale)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W' + b, for x (..., n_in); of several adapters for x (adapters, tokens, n_in)."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
