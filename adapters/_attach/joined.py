"""A frozen linear layer and the low-rank change of its weight as one step of autograd.

    y = x W^T + b + s (x A^T) B^T + s e

As two steps, backward makes the gradient of x twice and adds the halves, and a layer with a bias returns a view, into
which nothing can be added. As one, the second product is accumulated into what the first has made, in both directions:

    dx = dy W + d(x A^T) A,   d(x A^T) = s dy B
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as module_hooks

from adapters._attach import lowrank
from adapters._attach.called import CalledWeight, unobserved
from adapters._attach.container import CHILD
from adapters._attach.lowrank import rows_of
from adapters._attach.state import State, selection, tables

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # no subclass with products of its own


def is_product(cls: type[nn.Module]) -> bool:
    """Whether calling a module of this class is x W^T + b and nothing else, with parameters `weight` and `bias`."""
    loaded = sys.modules.get("transformers.pytorch_utils")  # else none of its layers is
    plain = (nn.Linear, loaded.Conv1D) if loaded is not None else (nn.Linear,)
    return any(cls.forward is each.forward for each in plain)


def together(module: nn.Module, state: State | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The output of a module under one adapter whose change is added, or None where the module is to be called first.

    That is where anybody could see the module's own output, or trains the module itself.
    """
    if state is None or kwargs or len(args) != 1 or not torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling() or tables(state) is not None:
        return None
    acting, held = selection(state), module._modules.get(CHILD)
    if len(acting) != 1 or acting.node is not None or held is None:
        return None
    entry: Any = held._modules.get(acting[0].slot)
    if not isinstance(entry, CalledWeight) or not entry.joins or not _is_plain(module, entry, args[0]):
        return None
    low = entry.factors(acting[0].at(entry))
    if low is None:
        return None
    w: Any = module.weight  # which another adapter's rows of tokens may stand in for
    made: Tensor = _Joined.apply(  # type: ignore[no-untyped-call]
        args[0],
        w if entry.w.transposed else w.mT,
        module.bias,
        low.left,
        low.right,
        low.bias,
        low.scale,
        entry.dropout,
    )
    return made


def _is_plain(module: nn.Module, entry: CalledWeight, x: Any) -> bool:
    """Whether the product is torch's own, of one dtype, with frozen parameters, and nobody looks at it."""
    w, b = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(x) not in _PLAIN or type(w) not in _PLAIN or w is None or w.requires_grad:
        return False
    if (b is not None and (type(b) not in _PLAIN or b.requires_grad)) or w.dtype != x.dtype or w.device != x.device:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return not module_hooks._global_forward_pre_hooks and _alone(module) and _alone(entry)


def _alone(module: nn.Module) -> bool:
    """Whether nothing happens at a call of the module but its forward."""
    return not module._forward_pre_hooks and unobserved(module)


class _Joined(torch.autograd.Function):
    """w (n_in, n_out), as rows of x are multiplied with it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        y = x.new_empty(*x.shape[:-1], w.shape[1])  # no view: models add to what a layer returned in place
        if b is None:
            torch.mm(rows_of(x), w, out=rows_of(y))
        else:
            torch.addmm(b, rows_of(x), w, out=rows_of(y))
        return lowrank.forward(ctx, y, x, (left, right, bias), scale, dropout, True, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        to_x, _, _, *needed = ctx.needs_input_grad
        saved = ctx.saved_tensors
        d_inner, *others = lowrank.backward(ctx, saved, dy, to_x, needed)
        d_x = None
        if to_x and d_inner is not None:
            d_x = lowrank.of_input(ctx, saved, d_inner, torch.mm(rows_of(dy), saved[-1].mT))
        return d_x, None, None, *others, None, None
