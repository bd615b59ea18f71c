"""Entries at weights: of a module that is called, of the input of one, of a parameter that other code reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from adapters._attach.container import Entry
from adapters._attach.factored import Factored
from adapters._attach.lowrank import add_lowrank
from adapters._attach.revised import Revised, Stored
from adapters._attach.scaled import ScaledWeight
from adapters._attach.weights import BaseWeight
from adapters._contract import Factors, Method, Scaled, Weight, WeightMethod, WeightSite
from adapters._fourbit import Packed, Readable, as_dense


class CalledWeight(Entry):
    """The change of a weight whose module is called: adds the method's delta to the module's output."""

    w: BaseWeight
    fresh: bool
    additive: bool
    joins: bool  # its module is a plain product and nothing else, which can be computed together with the change
    needs_factors = True  # where several adapters are computed at once

    def __init__(
        self,
        method: WeightMethod,
        site: WeightSite,
        tensors: Mapping[str, Tensor],
        w: BaseWeight,
        fresh: bool,
        product: bool = False,
    ) -> None:
        additive = method.factors(tensors) is not None
        super().__init__(method, site, tensors, w=w, fresh=fresh, additive=additive, joins=additive and product)

    @property
    def stackable(self) -> bool:
        return self.additive and not self.dropout

    @property
    def dropout(self) -> float:
        """Probability with which elements of the input are zeroed now."""
        return _dropout(self.method) if self.training else 0.0

    def factors(self, p: Mapping[str, Tensor]) -> Factors | None:
        return cast(WeightMethod, self.method).factors(p)

    def source(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return x

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        p: Mapping[str, Tensor],
        owned: bool = True,
        weight: float = 1.0,
        before: Any = (),
    ) -> Tensor:
        """The new output.

        Args:
            owned: y may be written to.
            weight: of what is added, where that is all.
            before: the entries that have changed the weight already, with their tensors.
        """
        method = cast(WeightMethod, self.method)
        fresh, dropout = owned and self.fresh and unobserved(self.w.owner), self.dropout
        low = method.factors(p)
        if low is not None:
            return add_lowrank(y, x, low if weight == 1.0 else replace(low, scale=weight * low.scale), fresh, dropout)
        x = F.dropout(x, dropout) if dropout else x
        w: Weight = ChangedWeight(self.w, before) if before else self.w
        scaled = None if dropout else method.scaled(w, p)
        if scaled is not None:
            return self._rescaled(y, x, p, w.bias(), scaled, fresh)
        # without a structural shortcut the delta is the difference of two near weights: in the tensors' dtype
        delta = method.delta(x.to(_dtype(p)), None if dropout else y, w, p)
        return y + delta.to(y.dtype).view(y.shape)

    def _rescaled(
        self, y: Tensor, x: Tensor, p: Mapping[str, Tensor], b: Tensor | None, scaled: Scaled, fresh: bool
    ) -> Tensor:
        """`outputs * (y + low x) + offset - outputs * b`: y holds the base's bias, which has a meaning of its own."""
        offset = cast(WeightMethod, self.method).offset(b, p)
        y = y if scaled.low is None else add_lowrank(y, x, scaled.low, fresh)
        if offset is None:
            return (y * scaled.outputs).to(y.dtype)
        shift = offset if b is None else offset - scaled.outputs * b
        return torch.addcmul(shift, y, scaled.outputs).to(y.dtype)


@dataclass(frozen=True)
class ChangedWeight:
    """A called weight after the changes of others: who needs it has it formed."""

    w: BaseWeight
    before: tuple[tuple[CalledWeight, Mapping[str, Tensor]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Tensor:
        dense = self.w.dense()
        for entry, p in self.before:
            if isinstance(entry, CalledWeight):
                dense = cast(WeightMethod, entry.method).changed(dense, p)
        return dense

    def bias(self) -> Tensor | None:
        b = self.w.bias()
        for entry, p in self.before:
            if isinstance(entry, CalledWeight):
                b = cast(WeightMethod, entry.method).offset(b, p)
        return b


class ScaledInput(Entry):
    """A change of a weight that is a scaling of its inputs: called before the module, with what it is called with."""

    def __init__(self, method: WeightMethod, site: WeightSite, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(method, site, tensors)

    def forward(self, p: Mapping[str, Tensor]) -> Tensor:
        """What scales the inputs, (n_in)."""
        inputs = cast(WeightMethod, self.method).inputs(p)
        assert inputs is not None, "an entry of this class is made where the method scales inputs"
        return inputs


class ReadWeight(Entry):
    """The change of a weight that other code reads: stands in for the parameter while the adapter acts."""

    w: BaseWeight

    def __init__(self, method: WeightMethod, site: WeightSite, tensors: Mapping[str, Tensor], w: BaseWeight) -> None:
        super().__init__(method, site, tensors, w=w)

    def forward(self, stored: Stored, p: Mapping[str, Tensor]) -> Stored:
        method, w = cast(WeightMethod, self.method), self.w
        if isinstance(stored, Tensor | Packed):
            low = method.factors(p)
            if low is not None:
                return self._factored(stored, low)
            scaled, inputs = method.scaled(w, p), method.inputs(p)
            if (scaled is not None or inputs is not None) and not w.folded:
                return self._scaled(stored, scaled, inputs)
        if isinstance(stored, Factored | ScaledWeight | Revised):
            dense = stored.dense("a second adapter")
        else:
            dense = as_dense(stored)
        return w.as_stored(method.changed(w.seen(dense), p)).to(dense.dtype)

    def _factored(self, stored: Readable, low: Factors) -> Factored:
        left, right = (low.right.mT, low.left.mT) if self.w.transposed else (low.left, low.right)
        dropout = _dropout(self.method) if self.training else 0.0
        return Factored(stored, left.to(stored.dtype), right.to(stored.dtype), low.scale, dropout)

    def _scaled(self, stored: Readable, scaled: Scaled | None, inputs: Tensor | None) -> ScaledWeight:
        low, outputs = (None, None) if scaled is None else (scaled.low, scaled.outputs)
        inner = stored if low is None else self._factored(stored, low)
        return ScaledWeight(inner, *((inputs, outputs) if self.w.transposed else (outputs, inputs)))


def _dropout(method: Method) -> float:
    return float(getattr(method, "dropout", 0.0))


def unobserved(owner: nn.Module) -> bool:
    """Whether nobody else can hold the output of this module's call: no hook saw it, nothing replaced its forward."""
    hooks = owner._forward_hooks or owner._backward_hooks or owner._backward_pre_hooks
    everywhere = module_hooks._global_forward_hooks or module_hooks._global_backward_hooks
    return not hooks and not everywhere and "forward" not in owner.__dict__


def _dtype(p: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(p.values())).dtype
