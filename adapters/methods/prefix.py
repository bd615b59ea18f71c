"""Prefix tuning: Optimizing Continuous Prompts for Generation (Li and Liang, 2021, arXiv 2101.00190, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from adapters._contract import KeyValueMethod, KeyValueSite, Tensors, require
from adapters._registry import add

Positions = Literal["before", "shifted"]


@add("prefix")
@dataclass(frozen=True)
class Prefix(KeyValueMethod):
    """Prefix: softmax(q [P_k; k]^T) [P_v; v] in every attention, P_k and P_v (heads, length, dim) trained.

    Args:
        length: number of prefix positions, in tokens; 0 takes all tokens of `text`.
        text: what the prefix starts as: the keys and values that the base computes for this text. Without one it starts
            as `length` beginning-of-text tokens, which models attend to when nothing else matters.
        positions: "before" leaves the real tokens where they are, and the prefix at positions -length to -1;
            "shifted" puts the prefix first and moves the real tokens by `length`, as PEFT does.
    """

    text: str | None = None

    def __post_init__(self) -> None:
        if self.length == 0 and self.text is None:
            object.__setattr__(self, "length", 16)  # a frozen dataclass fills in its own default
        require(self.length >= 0, f"length is {self.length}; it must be at least 1, or 0 with a text.")
        known = get_args(Positions)
        require(self.positions in known, f"positions is {self.positions!r}; it must be one of {', '.join(known)}.")

    def start(self) -> str | int:
        return self.text if self.text is not None else self.length

    def init(self, site: KeyValueSite, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"keys": keys.clone(), "values": values.clone()}

    def prefix(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["keys"], p["values"]
