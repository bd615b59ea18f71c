"""Adds a low-rank product to a linear layer's output with as little memory traffic as possible.

    y <- y + scale * ((x @ right.T) @ left.T + bias)

Autograd would keep a cast copy of `x`, the rank-wide product and a second output; this keeps `x` as it is, multiplies
it with the rank once more in backward, and writes into `y` where that is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        inner = inner_of(rows_of(x).to(wide_for(y)), right, scale)
        ctx.save_for_backward(x, left, right)
        ctx.scale, ctx.wide, ctx.dtype = scale, inner.dtype, None if bias is None else bias.dtype
        if inplace:
            ctx.mark_dirty(y)
        return add_into(y, inner, left, None if bias is None else scale * bias, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        to_y, *needed = ctx.needs_input_grad
        d_inner, *others = gradients(dy, x, (left, right, ctx.scale), needed, ctx.wide, ctx.dtype)
        d_x = None
        if d_inner is not None and needed[0]:
            d_x = torch.mm(d_inner, right.to(ctx.wide)).to(x.dtype).view(x.shape)
        return dy if to_y else None, d_x, *others, None, None


def gradients(
    dy: Tensor,
    x: Tensor,
    change: tuple[Tensor, Tensor, float],
    needed: Sequence[bool],
    wide: torch.dtype,
    of_bias: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """(d(x A^T), dB, dA, de) of a change `left (n_out, rank), right (rank, n_in), scale`.

    With d(x A^T) = s dy B:  dB = dy^T (s x A^T);  dA = d(x A^T)^T x;  dx = d(x A^T) A;  de = s sum dy.

    Args:
        needed: whether x, left, right and the bias need a gradient.
        wide: the dtype of the products.
        of_bias: that of the bias.
    """
    left, right, scale = change
    to_x, to_left, to_right, to_bias = needed[:4]
    rows = rows_of(dy).to(wide)
    seen = rows_of(x).to(wide) if to_left or to_right else None
    d_inner = d_left = d_right = None
    if to_left and seen is not None:
        # turned round, so that the long side of the thin product lies in rows: up to 1.8 times as fast in fp32
        d_left = torch.mm(inner_of(seen, right, scale).mT, rows).mT.to(left.dtype).contiguous()
    if to_x or to_right:
        d_inner = torch.mm(rows, left.to(wide)).mul_(scale)
        if to_right and seen is not None:
            d_right = torch.mm(d_inner.mT, seen).to(right.dtype)
    return d_inner, d_left, d_right, rows.sum(0).mul_(scale).to(of_bias) if to_bias else None


def wide_for(y: Tensor) -> torch.dtype:
    """The dtype of the products: y's, and on CPUs fp32 for few rows of 16 bits.

    Up to about 128 rows, casting both factors at every call costs more than it saves; from there on, casting the rows
    does: 4 times as much as all products of rank 16 in bf16 at 1,024 rows (forward and backward, AMX).
    """
    few = y.numel() < _FEW_ROWS * y.shape[-1]
    return torch.float32 if few and y.device.type == "cpu" and y.dtype.itemsize == 2 else y.dtype


def inner_of(x: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * x @ right.T: (rows, rank), for x (rows, n_in)."""
    return torch.mm(x, right.to(x.dtype).mT).mul_(scale)


def add_into(y: Tensor, inner: Tensor, left: Tensor, shift: Tensor | None, inplace: bool) -> Tensor:
    """y + inner @ left.T + shift, in y itself if `inplace`."""
    out = left.to(inner.dtype).mT
    if inner.dtype != y.dtype:
        wide = torch.mm(inner, out) if shift is None else torch.addmm(shift.to(inner.dtype), inner, out)
        change = wide.to(y.dtype).view(y.shape)
        return y.add_(change) if inplace else y + change
    if inplace:
        made = y
        rows_of(y).addmm_(inner, out)
    else:
        # no view: models add to what a layer returned in place
        made = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        torch.addmm(rows_of(y), inner, out, out=rows_of(made))
    return made if shift is None else made.add_(shift.to(y.dtype))


def rows_of(x: Tensor) -> Tensor:
    """(..., n) as (rows, n)."""
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
    return add_into(y, inner_of(rows_of(x).to(wide_for(y)), low.right, low.scale), low.left, shift, inplace)
