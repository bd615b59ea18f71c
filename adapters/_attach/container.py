"""Where an adapter's tensors live: `module.adapters[slot]`, a module that is called with a site's input and output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as module_hooks

from adapters._attach.factored import Factored
from adapters._attach.lowrank import add_lowrank
from adapters._attach.revised import Revised, Stored
from adapters._attach.scaled import ScaledWeight
from adapters._attach.state import take_tap
from adapters._attach.weights import BaseWeight
from adapters._contract import (
    Factors,
    Key,
    KeyValueMethod,
    Method,
    Scaled,
    Site,
    StreamMethod,
    StreamSite,
    WeightMethod,
    WeightSite,
)
from adapters._errors import AdapterError
from adapters._fourbit import Packed, Readable, as_dense

CHILD = "adapters"


class Container(nn.ModuleDict):
    """The child `adapters` of an adapted module; its entries are named by slot."""

    is_adapter_container = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Has no tensors of its own."""


class Entry(nn.Module):
    """One adapter's tensors at one site. Entries missing from a base's state dict are not an error of that dict."""

    def __init__(self, method: Method, site: Site, tensors: Mapping[str, Tensor], **own: Any) -> None:
        super().__init__()
        self.method, self.site = method, site
        for name, value in own.items():
            self.__dict__[name] = value  # before the tensors, whose names must not hide them; never a child
        # one order, fresh or loaded: an optimizer's state is matched with parameters by their order
        for name, tensor in sorted(tensors.items()):
            if hasattr(self, name) or "." in name or not name:
                raise AdapterError(f"method {method.name!r} cannot call a tensor {name!r}: the name is taken.")
            self.register_parameter(name, nn.Parameter(tensor))

    def tensors(self) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], self._parameters)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self._parameters):
            super()._load_from_state_dict(state_dict, prefix, *args)


class CalledWeight(Entry):
    """The change of a weight whose module is called: adds the method's delta to the module's output."""

    w: BaseWeight
    fresh: bool

    def __init__(
        self, method: WeightMethod, site: WeightSite, tensors: Mapping[str, Tensor], w: BaseWeight, fresh: bool
    ) -> None:
        super().__init__(method, site, tensors, w=w, fresh=fresh)

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        method, p = cast(WeightMethod, self.method), self.tensors()
        dropout = _dropout(method) if self.training else 0.0
        x = F.dropout(x, dropout) if dropout else x
        fresh = self.fresh and _unobserved(self.w.owner)
        low = method.factors(p)
        if low is not None:
            return add_lowrank(y, x, low, fresh)
        scaled = None if dropout else method.scaled(self.w, p)
        if scaled is not None:
            return self._rescaled(y, x, scaled, fresh)
        # without a structural shortcut the delta is the difference of two near weights: in the tensors' dtype
        delta = method.delta(x.to(_dtype(p)), None if dropout else y, self.w, p)
        return y + delta.to(y.dtype).view(y.shape)

    def _rescaled(self, y: Tensor, x: Tensor, scaled: Scaled, fresh: bool) -> Tensor:
        """`outputs * (y + low x) + offset - outputs * b`: y holds the base's bias, which has a meaning of its own."""
        b = self.w.bias()
        offset = cast(WeightMethod, self.method).offset(b, self.tensors())
        y = y if scaled.low is None else add_lowrank(y, x, scaled.low, fresh)
        if offset is None:
            return (y * scaled.outputs).to(y.dtype)
        shift = offset if b is None else offset - scaled.outputs * b
        return torch.addcmul(shift, y, scaled.outputs).to(y.dtype)


class ScaledInput(Entry):
    """A change of a weight that is a scaling of its inputs: called before the module, with what it is called with."""

    def __init__(self, method: WeightMethod, site: WeightSite, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(method, site, tensors)

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = cast(WeightMethod, self.method).inputs(self.tensors())
        assert inputs is not None, "an entry of this class is made where the method scales inputs"
        if args:
            return ((args[0] * inputs).to(args[0].dtype), *args[1:]), dict(kwargs)
        name, x = next(iter(kwargs.items()))
        return (), {**kwargs, name: (x * inputs).to(x.dtype)}


class ReadWeight(Entry):
    """The change of a weight that other code reads: stands in for the parameter while the adapter acts."""

    w: BaseWeight

    def __init__(self, method: WeightMethod, site: WeightSite, tensors: Mapping[str, Tensor], w: BaseWeight) -> None:
        super().__init__(method, site, tensors, w=w)

    def forward(self, stored: Stored) -> Stored:
        method, p, w = cast(WeightMethod, self.method), self.tensors(), self.w
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


class Stream(Entry):
    """The change of a branch's output before it is added to the residual stream."""

    tap: nn.Module | None

    def __init__(
        self, method: StreamMethod, site: StreamSite, tensors: Mapping[str, Tensor], tap: nn.Module | None
    ) -> None:
        super().__init__(method, site, tensors, tap=tap)

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        site, method, p = cast(StreamSite, self.site), cast(StreamMethod, self.method), self.tensors()
        y: Tensor = output if site.output is None else output[site.output]
        x = self._input(site, args, kwargs) if method.reads_input() else None
        dtype = y.dtype
        x, seen = (None if x is None else _last(x, site.input_axis)), _last(y, site.axis)
        if x is not None and x.shape != seen.shape:
            x = x.reshape(seen.shape)
        cast_p = {name: tensor.to(dtype) for name, tensor in p.items()}
        changed = method.stream(x, seen, cast_p).to(dtype)
        if changed.shape != seen.shape:
            raise AdapterError(f"method {method.name!r} makes {tuple(changed.shape)} of an output {tuple(seen.shape)}.")
        if site.axis != -1:
            changed = changed.movedim(-1, site.axis)
            # in y's memory format, by which torch chooses the kernel of the convolution that follows
            changed = changed.contiguous() if y.is_contiguous() else changed
        return _put(output, site.output, changed)

    def _input(self, site: StreamSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        if site.input is not None:
            named: Mapping[Any, Any] = kwargs
            at = site.input
            found = args[at] if isinstance(at, int) and at < len(args) else named.get(at)
        else:
            found = take_tap(self.tap) if self.tap is not None else None
        if not isinstance(found, Tensor):
            raise AdapterError(f"the input of the branch at {site.path} did not reach it in this forward.")
        return found


class KeyValue(Entry):
    """Keys and values that the attention interface prepends; never called by the module that holds it."""

    def forward(self) -> tuple[Tensor, Tensor]:
        return cast(KeyValueMethod, self.method).prefix(self.tensors())


class LayerStates(Entry):
    """Hidden states with which virtual tokens enter a layer; never called by the layer itself."""

    def forward(self) -> Tensor:
        return cast(KeyValueMethod, self.method).states(self.tensors())


class Replica(nn.Module):
    """A trained copy of a head: while its adapter acts it answers in the head's place, in the dtype of its input."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        trained = {name: p.to(inputs[0].dtype) if inputs else p for name, p in self.head.named_parameters()}
        return functional_call(self.head, trained, args, dict(kwargs))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Has no tensors of its own."""


def _dropout(method: Method) -> float:
    return float(getattr(method, "dropout", 0.0))


def _unobserved(owner: nn.Module) -> bool:
    """Whether nobody else can hold the output of this module's call: no hook saw it, nothing replaced its forward."""
    hooks = owner._forward_hooks or owner._backward_hooks or owner._backward_pre_hooks
    everywhere = module_hooks._global_forward_hooks or module_hooks._global_backward_hooks
    return not hooks and not everywhere and "forward" not in owner.__dict__


def _dtype(p: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(p.values())).dtype


def _last(value: Tensor, axis: int) -> Tensor:
    # contiguous: of other layouts torch makes other products where the adapter trains than where it is frozen
    return (value if axis == -1 else value.movedim(axis, -1)).contiguous()


def _put(output: Any, key: Key, changed: Tensor) -> Any:
    """`output` with the element at `key` exchanged; containers keep their type."""
    if key is None:
        return changed
    if isinstance(output, tuple):
        items = [changed if i == key else item for i, item in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    output[key] = changed
    return output
