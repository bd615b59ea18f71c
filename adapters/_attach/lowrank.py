"""Adds a low-rank product to a linear layer's output with as little memory traffic as possible.

    y <- y + scale * (x @ right.T) @ left.T

Autograd would keep a cast copy of `x`, the product `x @ right.T` and a second output; this keeps `x` alone, writes
into `y` where that is safe, and recomputes the rank-wide product in the backward pass.
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
        ctx.save_for_backward(x, left, right)
        ctx.scale = scale
        if inplace:
            ctx.mark_dirty(y)
        return _add(y, x, left, right, scale, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        rows, grads = dy.reshape(-1, dy.shape[-1]), ctx.needs_input_grad
        x2 = x.reshape(-1, x.shape[-1]).to(dy.dtype)
        a, b = right.to(dy.dtype), left.to(dy.dtype)
        # d(x A^T) = s dy B;  dB = s dy^T (x A^T);  dA = d(x A^T)^T x;  dx = d(x A^T) A
        inner = (rows @ b).mul_(ctx.scale) if grads[1] or grads[3] else None
        d_left = (rows.mT @ (x2 @ a.mT)).mul_(ctx.scale).to(left.dtype) if grads[2] else None
        d_right = (inner.mT @ x2).to(right.dtype) if inner is not None and grads[3] else None
        d_x = (inner @ a).view(x.shape).to(x.dtype) if inner is not None and grads[1] else None
        return dy if grads[0] else None, d_x, d_left, d_right, None, None


def _add(y: Tensor, x: Tensor, left: Tensor, right: Tensor, scale: float, inplace: bool) -> Tensor:
    x2 = x.reshape(-1, x.shape[-1]).to(y.dtype)
    inner = x2 @ right.to(y.dtype).mT
    out = left.to(y.dtype).mT
    if inplace:
        y.view(-1, y.shape[-1]).addmm_(inner, out, alpha=scale)
        return y
    return torch.addmm(y.reshape(-1, y.shape[-1]), inner, out, alpha=scale).view(y.shape)


def add_lowrank(y: Tensor, x: Tensor, low: Factors, fresh: bool) -> Tensor:
    """`y + scale * x @ right.T @ left.T`, computed in y's dtype.

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
        return _add(y, x, low.left, low.right, low.scale, inplace)
