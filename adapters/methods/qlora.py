"""QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023, arXiv 2305.14314, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adapters._contract import Factors, Tensors, Weight, WeightMethod, WeightSite
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
    quantize: ClassVar[str | None] = "nf4"

    def __post_init__(self) -> None:
        self.lora()  # refuses bad values

    def lora(self) -> LoRA:
        """The same method without the preset."""
        return LoRA(self.rank, self.alpha, self.rslora, self.dropout)

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        return self.lora().init(site, w)

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        return self.lora().weight(w, p)

    def factors(self, p: Tensors) -> Factors:
        return self.lora().factors(p)
