"""How a method may change a weight, for the engine's shortcuts: a low-rank product, a scaling; and the base's weight.

Shapes as in the contract: `x (..., n_in)`, `w (n_out, n_in)`, with a leading `experts` dimension where they are fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Weight(Protocol):
    """A base weight that is read on demand, so that a 4-bit weight is dequantised only by who needs it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dense(self) -> Tensor:
        """The weight in the contract's orientation, `(n_out, n_in)`, in the base's floating-point dtype."""
        ...

    def bias(self) -> Tensor | None:
        """What the base adds to the product, `(n_out,)`; None where it adds nothing, or where the weight is read."""
        ...


@dataclass(frozen=True)
class Factors:
    """A low-rank change: `scale * left @ right` of the weight and `scale * bias` of the bias.

    left `(..., n_out, rank)`, right `(..., rank, n_in)`, bias `(..., n_out)` or None for no change.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    def dense(self) -> Tensor:
        return self.scale * (self.left @ self.right)

    def delta(self, x: Tensor) -> Tensor:
        change = x @ self.right.mT @ self.left.mT
        return self.scale * (change if self.bias is None else change + self.bias.unsqueeze(-2))


@dataclass(frozen=True)
class Scaled:
    """A change that scales every output, after a low-rank change of the weight: `diag(outputs) (w + low)`.

    outputs `(..., n_out)`. What becomes of the bias is the method's `offset`, whatever the outputs are scaled by.
    """

    outputs: Tensor
    low: Factors | None = None

    def delta(self, x: Tensor, product: Tensor) -> Tensor:
        """What to add to `product = x @ w.T`."""
        outputs = self.outputs.unsqueeze(-2)
        scaled = (outputs - 1) * product
        return scaled if self.low is None else scaled + outputs * self.low.delta(x)
