"""Reads a base weight in the contract's orientation, whatever it is stored as."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adapters._contract import WeightSite
from adapters._quantize import dequantize, is_quantized


@dataclass(frozen=True)
class BaseWeight:
    """The weight handle that methods receive: nothing is dequantised or copied before `dense` is called."""

    owner: nn.Module
    parameter: str
    shape: tuple[int, ...]
    stored_transposed: bool
    folded: tuple[int, ...] = ()  # the stored axes that are seen as one

    @property
    def stored(self) -> nn.Parameter:
        found = self.owner._parameters[self.parameter]
        assert found is not None
        return found

    @property
    def transposed(self) -> bool:
        # a Conv1D that was quantised in place holds its weight as (n_out, n_in)
        return self.stored_transposed and not is_quantized(self.stored)

    def dense(self) -> Tensor:
        stored = self.stored
        if is_quantized(stored):
            return dequantize(stored)
        return self.seen(stored)

    def seen(self, stored: Tensor) -> Tensor:
        """A tensor in the shape of the stored parameter, in the contract's orientation."""
        matrix = stored.flatten(1) if self.folded else stored
        return matrix.mT if self.transposed else matrix

    def as_stored(self, w: Tensor) -> Tensor:
        """The inverse of `seen`."""
        matrix = w.mT if self.transposed else w
        return matrix.reshape(-1, *self.folded) if self.folded else matrix


def base_weight(model: nn.Module, site: WeightSite) -> BaseWeight:
    """The handle of a site's weight."""
    return BaseWeight(model.get_submodule(site.owner), site.parameter, site.shape, site.transposed, site.folded)
