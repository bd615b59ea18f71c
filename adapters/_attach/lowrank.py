"""Adds a low-rank product to a linear layer's output with as little memory traffic as possible.

    y <- y + scale * ((x @ right.T) @ left.T + bias)

Autograd would keep a cast copy of `x`, the rank-wide product and a second output; this keeps `x` as it is, multiplies
it with the rank once more in backward, and writes into `y` where that is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters._contract import Factors

_FEW_ROWS = 256


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float,
        inplace: bool,
    ) -> Tensor:
        if inplace:
            ctx.mark_dirty(y)
        return forward(ctx, y, x, (left, right, bias), scale, dropout, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        to_y, to_x, *needed = ctx.needs_input_grad
        saved = ctx.saved_tensors
        d_inner, *others = backward(ctx, saved, dy, to_x, needed)
        d_x = of_input(ctx, saved, d_inner) if to_x and d_inner is not None else None
        return dy if to_y else None, d_x, *others, None, None, None


def forward(
    ctx: Any,
    y: Tensor,
    x: Tensor,
    change: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
    dropout: float,
    inplace: bool,
    *more: Tensor,
) -> Tensor:
    """y with the change of x added to it, in y itself if `inplace`; keeps x and what it is multiplied with, and `more`.

    With dropout, x is kept as it is beside a mask of a byte an element, in place of what is left of it.
    """
    left, right, bias = change
    seen, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
    inner = inner_of(rows_of(seen).to(wide_for(y)), right, scale)
    ctx.save_for_backward(x, mask, left, right, *more)
    ctx.scale, ctx.dropout, ctx.wide, ctx.dtype = scale, dropout, inner.dtype, None if bias is None else bias.dtype
    return _add(y, inner, left, None if bias is None else scale * bias, inplace)


def backward(
    ctx: Any, saved: Sequence[Any], dy: Tensor, to_x: bool, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(d(x A^T), dB, dA, de), with what `forward` saved; `needed`: which of the last three are asked for.

    d(x A^T) = s dy B;  dB = dy^T (s x A^T);  dA = d(x A^T)^T x;  de = s sum dy
    """
    x, mask, left, right, *_ = saved
    to_left, to_right, to_bias = needed[:3]
    rows = rows_of(dy).to(ctx.wide)
    seen = rows_of(_masked(x, mask, ctx.dropout)).to(ctx.wide) if to_left or to_right else None
    d_inner = d_left = d_right = None
    if to_left and seen is not None:
        # turned round, so that the long side of the thin product lies in rows: up to 1.8 times as fast in fp32
        d_left = torch.mm(inner_of(seen, right, ctx.scale).mT, rows).mT.to(left.dtype).contiguous()
    if to_x or to_right:
        d_inner = torch.mm(rows, left.to(ctx.wide)).mul_(ctx.scale)
        if to_right and seen is not None:
            d_right = torch.mm(d_inner.mT, seen).to(right.dtype)
    d_bias = rows.sum(0).mul_(ctx.scale).to(ctx.dtype) if to_bias else None
    return d_inner, d_left, d_right, d_bias


def of_input(ctx: Any, saved: Sequence[Any], d_inner: Tensor, into: Tensor | None = None) -> Tensor:
    """dx = d(x A^T) A, in the shape of x, added to `into` (rows, n_in) if that is given."""
    x, mask, _, right, *_ = saved
    right = right.to(ctx.wide)
    if into is not None and mask is None and into.dtype == ctx.wide:
        return into.addmm_(d_inner, right).view(x.shape)
    d_x = _masked(torch.mm(d_inner, right).view(x.shape), mask, ctx.dropout).to(x.dtype)
    return d_x if into is None else into.view(x.shape).add_(d_x)


def _masked(x: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """What torch's dropout leaves of x."""
    return x if mask is None else torch.mul(x, mask).mul_(1 / (1 - dropout))


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


def _add(y: Tensor, inner: Tensor, left: Tensor, shift: Tensor | None, inplace: bool) -> Tensor:
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


def add_lowrank(y: Tensor, x: Tensor, low: Factors, fresh: bool, dropout: float = 0.0) -> Tensor:
    """`y + scale * (x @ right.T @ left.T + bias)`, in y's dtype.

    Args:
        y: (..., n_out), the base's output.
        x: (..., n_in).
        low: left (n_out, rank), right (rank, n_in), bias (n_out) or None.
        fresh: y was just made by a matrix product and nobody else holds it, so it may be overwritten.
        dropout: probability with which an element of x is zeroed; the others are divided by 1 - dropout.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula itself
        xc = F.dropout(x, dropout).to(y.dtype) if dropout else x.to(y.dtype)
        change = xc @ low.right.to(y.dtype).mT @ low.left.to(y.dtype).mT
        return y + low.scale * (change if low.bias is None else change + low.bias.to(y.dtype))
    inplace = fresh and y.is_contiguous() and not y._is_view() and not (y.is_leaf and y.requires_grad)
    if torch.is_autocast_enabled(y.device.type):  # y already has autocast's dtype
        with torch.autocast(y.device.type, enabled=False):
            return _run(y, x, low, dropout, inplace)
    return _run(y, x, low, dropout, inplace)


def _run(y: Tensor, x: Tensor, low: Factors, dropout: float, inplace: bool) -> Tensor:
    if torch.is_grad_enabled():
        out: Tensor = _AddLowRank.apply(y, x, low.left, low.right, low.bias, low.scale, dropout, inplace)  # type: ignore[no-untyped-call]
        return out
    x = F.dropout(x, dropout) if dropout else x
    shift = None if low.bias is None else low.scale * low.bias
    return _add(y, inner_of(rows_of(x).to(wide_for(y)), low.right, low.scale), low.left, shift, inplace)
