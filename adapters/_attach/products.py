"""Products with a factored weight, each the base's plus two thin ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters._attach.factored import Factored, Shortcut, shortcuts


def _shortcut(*names: str) -> Callable[[Shortcut], Shortcut]:
    def register(function: Shortcut) -> Shortcut:
        shortcuts.update(dict.fromkeys(names, function))
        return function

    return register


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs


def _times(x: Tensor, a: Tensor) -> Tensor:
    """x @ a, of a matrix on two axes: torch folds the rows of `x`, and rounds, by whether `a` requires a gradient."""
    if a.dim() > 2:
        return x @ a
    return (x.reshape(-1, x.shape[-1]) @ a).view(*x.shape[:-1], a.shape[-1])


@_shortcut("linear")
def _linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """x (..., m), w (n, m): y = x w^T + s (x right^T) left^T."""
    given = _named(("input", "weight", "bias"), args, kwargs)
    x, w, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(w, Factored) or not isinstance(x, Tensor) or w.kernel:
        return None
    y: Tensor = F.linear(x, w.base, bias)
    delta = _times(_times(w.dropped(x, w.right.dtype), w.right.mT), w.left.mT)
    return y + w.scale * delta.to(y.dtype)


@_shortcut("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One factored operand: x w = x base + s (x left) right, or w x = base x + s left (right x)."""
    if kwargs or len(args) != 2 or any(isinstance(each, Factored) and each.kernel for each in args):
        return None
    a, b = reversed(args) if getattr(func, "__name__", "") == "__rmatmul__" else args
    if isinstance(b, Factored) and isinstance(a, Tensor):
        y: Tensor = torch.matmul(a, b.base)
        return y + b.scale * _times(_times(b.dropped(a, b.left.dtype), b.left), b.right).to(y.dtype)
    if isinstance(a, Factored) and isinstance(b, Tensor):
        y = torch.matmul(a.base, b)
        inner = _times(a.dropped(b, a.left.dtype).mT, a.right.mT)
        return y + a.scale * _times(inner, a.left.mT).mT.to(y.dtype)
    return None


@_shortcut("addmm", "baddbmm")
def _added(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """addmm or baddbmm with the factored weight on the right: c + x w."""
    if kwargs or len(args) != 3 or not isinstance(args[2], Factored) or not isinstance(args[1], Tensor):
        return None
    c, x = args[:2]
    w: Factored = args[2]
    if w.kernel:
        return None
    y: Tensor = func(c, x, w.base)
    delta = _times(_times(w.dropped(x, w.left.dtype), w.left), w.right)
    return y + w.scale * delta.to(y.dtype)


@_shortcut("grouped_mm")
def _grouped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """x (tokens, n) sorted by expert, w (experts, n, m): each thin product is grouped like the base's."""
    if len(args) < 2 or not isinstance(args[1], Factored) or not isinstance(args[0], Tensor):
        return None
    x, w, rest = args[0], args[1], args[2:]
    y: Tensor = func(x, w.base, *rest, **kwargs)
    # the kernel wants strides of whole 16 bytes: 8 elements of bf16, so the rank is padded with zeros to that
    missing = -w.left.shape[-1] % 8
    left = F.pad(w.left, (0, missing)).to(x.dtype).contiguous()
    right = F.pad(w.right, (0, 0, 0, missing)).to(x.dtype).contiguous()
    inner = func(w.dropped(x, x.dtype), left, *rest, **kwargs)
    delta: Tensor = func(inner, right, *rest, **kwargs)
    return y + w.scale * delta.to(y.dtype)


@_shortcut("conv1d", "conv2d", "conv3d")
def _convolved(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A kernel (n, channels / groups, *k): convolve with the rank kernels of `right`, then mix them with `left`.

    In a grouped convolution each group's channels meet all rank kernels, and each output those of its own group.
    """
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = _named(names, args, kwargs)
    x, w, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if not isinstance(w, Factored) or not isinstance(x, Tensor):
        return None
    y: Tensor = func(x, w.base, bias, **given)
    groups, spatial = given.get("groups", 1), w.base.dim() - 2
    right = w.right.view(-1, *w.base.shape[1:]).repeat(groups, *[1] * (spatial + 1))
    inner = func(w.dropped(x, w.right.dtype), right, None, **given)
    delta: Tensor = func(inner, w.left.view(*w.left.shape, *[1] * spatial), None, groups=groups)
    return y + w.scale * delta.to(y.dtype)


@_shortcut("embedding")
def _looked_up(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A table (n, m): row i of base + s left right is base[i] + s left[i] right; the padding's takes no gradient."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    given = _named(names, args, kwargs)
    ids, w, padding = given.get("input"), given.get("weight"), given.get("padding_idx")
    if not isinstance(w, Factored) or not isinstance(ids, Tensor) or w.kernel:
        return None
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None
    y: Tensor = func(ids, w.base, *args[2:], **kwargs)
    left = F.embedding(ids, w.left)
    if w.dropout:  # what meets the table is one-hot: its one element is zeroed, or is not
        left = left * F.dropout(left.new_ones(*left.shape[:-1], 1), w.dropout)
    change = left @ w.right
    if padding is not None:
        change = torch.where((ids == padding % w.base.shape[0])[..., None], change.detach(), change)
    return y + w.scale * change.to(y.dtype)
