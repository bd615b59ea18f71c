"""QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023, arXiv 2305.14314, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from adapters._contract import Factors, Site, Tensors, Weight, WeightMethod, WeightSite
from adapters._registry import add
from adapters.methods.lora import LoRA


@add("qlora")
@dataclass(frozen=True)
class QLoRA(WeightMethod):
    """QLoRA: y = dequant(nf4(W)) x + s B A x, LoRA on every linear site of a base in 4 bits.

    A preset: the mathematics is LoRA's, whose fields it shares; attaching it quantises the base first (nf4 with double
    quantisation), unless the base is in 4 bits already.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    quantize: ClassVar[str | None] = "nf4"

    def __post_init__(self) -> None:
        checked = self.lora()  # refuses bad values
        object.__setattr__(self, "rank_pattern", checked.rank_pattern)
        object.__setattr__(self, "alpha_pattern", checked.alpha_pattern)

    def lora(self) -> LoRA:
        """The same method without the preset."""
        return LoRA(**vars(self))

    def at(self, site: Site) -> Self:
        return replace(self, **vars(self.lora().at(site)))

    def review(self, sites: Sequence[Site]) -> tuple[str, ...]:
        return self.lora().review(sites)

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        return self.lora().init(site, w)

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        return self.lora().weight(w, p)

    def offset(self, b: Tensor | None, p: Tensors) -> Tensor | None:
        return self.lora().offset(b, p)

    def factors(self, p: Tensors) -> Factors:
        return self.lora().factors(p)
