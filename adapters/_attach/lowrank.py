"""Adds a low-rank product to a linear layer's output with as little memory traffic as possible.

    y <- y + scale * ((x @ right.T) @ left.T + bias)

Autograd would keep a cast copy of `x`, the rank-wide product and a second output; this keeps `x` as it is, multiplies
it with the rank once more in backward, and writes into `y` where that is safe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters._contract import Factors

_FEW_ROWS = 256


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, scale: float, inplace: bool
    ) -> Tensor:
        inner = _inner(_rows(x).to(_wide(y)), right, scale)
        ctx.save_for_backward(x, left, right)
        ctx.scale, ctx.wide, ctx.dtype = scale, inner.dtype, None if bias is None else bias.dtype
        if inplace:
            ctx.mark_dirty(y)
        return _add(y, inner, left, None if bias is None else scale * bias, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        to_y, to_x, to_left, to_right, to_bias, *_ = ctx.needs_input_grad
        rows = _rows(dy).to(ctx.wide)
        seen = _rows(x).to(ctx.wide) if to_left or to_right else None
        # d(x A^T) = s dy B;  dB = dy^T (s x A^T);  dA = d(x A^T)^T x;  dx = d(x A^T) A;  de = s sum dy
        d_left = d_right = d_x = None
        if to_left and seen is not None:
            d_left = torch.mm(rows.mT, _inner(seen, right, ctx.scale)).to(left.dtype)
        if to_x or to_right:
            d_inner = torch.mm(rows, left.to(ctx.wide)).mul_(ctx.scale)
            if to_right and seen is not None:
                d_right = torch.mm(d_inner.mT, seen).to(right.dtype)
            if to_x:
                d_x = torch.mm(d_inner, right.to(ctx.wide)).to(x.dtype).view(x.shape)
        d_bias = rows.sum(0).mul_(ctx.scale).to(ctx.dtype) if to_bias else None
        return dy if to_y else None, d_x, d_left, d_right, d_bias, None, None


def _wide(y: Tensor) -> torch.dtype:
    """The dtype of the products: y's, and on CPUs fp32 for few rows of 16 bits.

    Up to about 128 rows, casting both factors at every call costs more than it saves; from there on, casting the rows
    does: 4 times as much as all products of rank 16 in bf16 at 1,024 rows (forward and backward, AMX).
    """
    few = y.numel() < _FEW_ROWS * y.shape[-1]
    return torch.float32 if few and y.device.type == "cpu" and y.dtype.itemsize == 2 else y.dtype


def _inner(x: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * x @ right.T: (rows, rank), for x (rows, n_in)."""
    return torch.mm(x, right.to(x.dtype).mT).mul_(scale)


def _add(y: Tensor, inner: Tensor, left: Tensor, shift: Tensor | None, inplace: bool) -> Tensor:
    out = left.to(inner.dtype).mT
    if inner.dtype != y.dtype:
        wide = torch.mm(inner, out) if shift is None else torch.addmm(shift.to(inner.dtype), inner, out)
        change = wide.to(y.dtype).view(y.shape)
        return y.add_(change) if inplace else y + change
    if inplace:
        made = y
        _rows(y).addmm_(inner, out)
    else:
        # no view: models add to what a layer returned in place
        made = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        torch.addmm(_rows(y), inner, out, out=_rows(made))
    return made if shift is None else made.add_(shift.to(y.dtype))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def add_lowrank(y: Tensor, x: Tensor, low: Factors, fresh: bool) -> Tensor:
    """`y + scale * (x @ right.T @ left.T + bias)`, in y's dtype.

    Args:
        y: (..., n_out), the base's output.
        x: (..., n_in).
        low: left (n_out, rank), right (rank, n_in), bias (n_out) or None.
        fresh: y was just made by a matrix product and nobody else holds it, so it may be overwritten.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula itself
        xc = x.to(y.dtype)
        change = xc @ low.right.to(y.dtype).mT @ low.left.to(y.dtype).mT
        return y + low.scale * (change if low.bias is None else change + low.bias.to(y.dtype))
    inplace = fresh and y.is_contiguous() and not y._is_view() and not (y.is_leaf and y.requires_grad)
    if torch.is_autocast_enabled(y.device.type):  # y already has autocast's dtype
        with torch.autocast(y.device.type, enabled=False):
            return _run(y, x, low, inplace)
    return _run(y, x, low, inplace)


def _run(y: Tensor, x: Tensor, low: Factors, inplace: bool) -> Tensor:
    if torch.is_grad_enabled():
        out: Tensor = _AddLowRank.apply(y, x, low.left, low.right, low.bias, low.scale, inplace)  # type: ignore[no-untyped-call]
        return out
    shift = None if low.bias is None else low.scale * low.bias
    return _add(y, _inner(_rows(x).to(_wide(y)), low.right, low.scale), low.left, shift, inplace)
