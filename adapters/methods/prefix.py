"""Prefix tuning: Optimizing Continuous Prompts for Generation (Li and Liang, 2021, arXiv 2101.00190, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from adapters._contract import KeyValueMethod, KeyValueSite, LayerSite, Tensors, require
from adapters._registry import add

Positions = Literal["before", "shifted"]
Where = Literal["attention", "layers"]


@add("prefix")
@dataclass(frozen=True)
class Prefix(KeyValueMethod):
    """Prefix: softmax(q [P_k; k]^T) [P_v; v] in every attention, P_k and P_v (heads, length, dim) trained.

    In a model without an attention: h_l = [P_l; h_l] before every layer l, P_l (length, width) trained (deep prompts:
    Qin and Eisner, 2021, arXiv 2104.06599, section 3.2).

    Args:
        length: number of prefix positions, in tokens; 0 takes all tokens of `text`.
        text: what the prefix starts as: the keys and values that the base computes for this text. Without one it starts
            as `length` beginning-of-text tokens, which models attend to when nothing else matters.
        positions: "before" leaves the real tokens where they are, and the prefix at positions -length to -1;
            "shifted" puts the prefix first and moves the real tokens by `length`, as PEFT does.
        where: "attention", "layers", or None for attentions where the model has any, and layers where it has none.
    """

    text: str | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        if self.length == 0 and self.text is None:
            object.__setattr__(self, "length", 16)  # a frozen dataclass fills in its own default
        require(self.length >= 0, f"length is {self.length}; it must be at least 1, or 0 with a text.")
        known = get_args(Positions)
        require(self.positions in known, f"positions is {self.positions!r}; it must be one of {', '.join(known)}.")

        wheres = get_args(Where)
        require(
            self.where in (None, *wheres), f"where is {self.where!r}; it must be one of {', '.join(wheres)}, or None."
        )

    def kinds(self) -> tuple[str, ...]:
        return {"attention": ("keyvalue",), "layers": ("layer",)}.get(self.where or "", ("keyvalue", "layer"))

    def start(self) -> str | int:
        return self.text if self.text is not None else self.length

    def init(self, site: KeyValueSite, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"keys": keys.clone(), "values": values.clone()}

    def prefix(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["keys"], p["values"]

    def init_states(self, site: LayerSite, states: Tensor) -> dict[str, Tensor]:
        return {"states": states.clone()}

    def states(self, p: Tensors) -> Tensor:
        return p["states"]
