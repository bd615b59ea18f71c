"""Adds a low-rank product to a linear layer's output with as little memory traffic as possible.

    y <- y + scale * (x @ right.T) @ left.T

Autograd would keep a cast copy of `x` and a second output; this keeps `x` as it is and the rank-wide product, and
writes into `y` where that is safe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters._contract import Factors


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, left: Tensor, right: Tensor, scale: float, inplace: bool) -> Tensor:
        wide = _wide(y)
        inner = _rows(x).to(wide) @ right.to(wide).mT
        ctx.save_for_backward(x, left, right, inner)
        ctx.scale = scale
        if inplace:
            ctx.mark_dirty(y)
        return _add(y, inner, left.to(wide), scale, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, inner = ctx.saved_tensors
        grads, wide = ctx.needs_input_grad, inner.dtype
        rows = _rows(dy).to(wide)
        # d(x A^T) = s dy B;  dB = s dy^T (x A^T);  dA = d(x A^T)^T x;  dx = d(x A^T) A
        d_inner = (rows @ left.to(wide)).mul_(ctx.scale) if grads[1] or grads[3] else None
        d_left = (rows.mT @ inner).mul_(ctx.scale).to(left.dtype) if grads[2] else None
        d_right = (d_inner.mT @ _rows(x).to(wide)).to(right.dtype) if d_inner is not None and grads[3] else None
        d_x = (d_inner @ right.to(wide)).view(x.shape).to(x.dtype) if d_inner is not None and grads[1] else None
        return dy if grads[0] else None, d_x, d_left, d_right, None, None


def _wide(y: Tensor) -> torch.dtype:
    """The dtype of the rank-wide products.

    On CPUs fp32: 16-bit products of rank 16 take 1.2 to 2.4 times as long there, and their factors would be cast first.
    """
    return torch.float32 if y.device.type == "cpu" and y.dtype.itemsize == 2 else y.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _add(y: Tensor, inner: Tensor, left: Tensor, scale: float, inplace: bool) -> Tensor:
    if inner.dtype != y.dtype:
        change = (inner @ left.mT).view(y.shape)
        return y.add_(change, alpha=scale) if inplace else torch.add(y, change.to(y.dtype), alpha=scale)
    if inplace:
        y.view(-1, y.shape[-1]).addmm_(inner, left.mT, alpha=scale)
        return y
    return torch.addmm(_rows(y), inner, left.mT, alpha=scale).view(y.shape)


def add_lowrank(y: Tensor, x: Tensor, low: Factors, fresh: bool) -> Tensor:
    """`y + scale * x @ right.T @ left.T`, in y's dtype.

    Args:
        y: (..., n_out), the base's output.
        x: (..., n_in).
        low: left (n_out, rank), right (rank, n_in).
        fresh: y was just made by a matrix product and nobody else holds it, so it may be overwritten.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula itself
        xc = x.to(y.dtype)
        return y + low.scale * (xc @ low.right.to(y.dtype).mT @ low.left.to(y.dtype).mT)
    inplace = fresh and y.is_contiguous() and not y._is_view() and not (y.is_leaf and y.requires_grad)
    with torch.autocast(y.device.type, enabled=False):  # y already has autocast's dtype
        if torch.is_grad_enabled():
            out: Tensor = _AddLowRank.apply(y, x, low.left, low.right, low.scale, inplace)  # type: ignore[no-untyped-call]
            return out
        wide = _wide(y)
        return _add(y, _rows(x).to(wide) @ low.right.to(wide).mT, low.left.to(wide), low.scale, inplace)
