"""IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper (Liu, 2022, arXiv 2205.05638, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters._contract import Scaled, Site, Tensors, Weight, WeightMethod, WeightSite
from adapters._patterns import require_matches
from adapters._registry import add
from adapters._sites.select import matches
from adapters.methods.lora import is_read

KEYS_AND_VALUES = ("attention.key", "attention.value", "attention.kv", "attention.qkv")
FEEDFORWARD = ("mlp.down", "ssm.out")


@add("ia3")
@dataclass(frozen=True)
class IA3(WeightMethod):
    """IA3: W' = l * W, l (n_out, 1) at keys and values, where b' = l * b, (1, n_in) in feed-forwards; l = 1 at start.

    Without targets it acts where the paper does: at keys and values, and inside the feed-forward. Where queries, keys
    and values are one weight, the queries are scaled too, which scaling the keys could do as well. A state-space
    block is taken for a feed-forward: what its last weight reads is scaled.

    Args:
        feedforward: the sites whose inputs are scaled instead of their outputs, by what `targets` accepts.
    """

    feedforward: tuple[str, ...] = FEEDFORWARD

    def __post_init__(self) -> None:
        named = (self.feedforward,) if isinstance(self.feedforward, str) else tuple(self.feedforward)
        object.__setattr__(self, "feedforward", named)  # of a frozen dataclass

    def wants(self, site: Site) -> bool:
        return site.default and site.role in (*KEYS_AND_VALUES, *FEEDFORWARD)

    def review(self, sites: Sequence[Site]) -> tuple[str, ...]:
        require_matches("feedforward", [entry for entry in self.feedforward if entry not in FEEDFORWARD], sites)
        read = [site.path for site in sites if is_read(site) and not self._scales_inputs(site)]
        if not read:
            return ()
        return (f"{len(read)} sites keep their bias, if any, as their weight is read, not called, such as {read[0]}",)

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        lead = () if site.experts is None else (site.experts,)
        if self._scales_inputs(site):
            return {"input": torch.ones(*lead, 1, site.n_in)}
        return {"output": torch.ones(*lead, site.n_out, 1)}

    def _scales_inputs(self, site: Site) -> bool:
        return any(matches(entry, site) for entry in self.feedforward)

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        return w * (p["input"] if "input" in p else p["output"])

    def offset(self, b: Tensor | None, p: Tensors) -> Tensor | None:
        return b if b is None or "input" in p else p["output"].squeeze(-1) * b

    def scaled(self, w: Weight, p: Tensors) -> Scaled | None:
        return None if "input" in p else Scaled(p["output"].squeeze(-1))

    def inputs(self, p: Tensors) -> Tensor | None:
        return p["input"].squeeze(-2) if "input" in p else None
