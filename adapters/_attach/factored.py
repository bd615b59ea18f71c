"""A weight that is read, not called: `w + scale * left @ right` that is multiplied without ever being formed.

Fused experts index, transpose and multiply their parameter in many ways. This stand-in follows the indexing and the
transpositions, and turns each product into the base's plus two thin ones. What it cannot follow it forms densely, and
counts: a count that grows is a lost shortcut, never a wrong result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

formed_densely: Counter[str] = Counter()  # how often, by the function that asked

_METADATA = frozenset(
    {"shape", "dtype", "device", "ndim", "dim", "size", "numel", "layout", "is_cuda", "is_meta", "stride"}
    | {"is_contiguous", "element_size", "data_ptr", "is_floating_point", "requires_grad"}
    | {"untyped_storage", "storage_offset"}
)


class Factored:
    """`base + scale * left @ right`: base (..., n, m), left (..., n, rank), right (..., rank, m), in storage order.

    `dropout` is the probability with which elements of what is multiplied with the change are zeroed.
    """

    __slots__ = ("base", "dropout", "left", "right", "scale")

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, scale: float, dropout: float = 0.0) -> None:
        self.base, self.left, self.right, self.scale, self.dropout = base, left, right, scale, dropout

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        return F.dropout(x, self.dropout) if self.dropout else x

    def dense(self, asked_by: str = "dense") -> Tensor:
        formed_densely[asked_by] += 1
        return self.base + (self.scale * (self.left @ self.right)).to(self.base.dtype)

    def with_parts(self, change: Callable[[Tensor], Tensor]) -> Factored:
        return Factored(change(self.base), change(self.left), change(self.right), self.scale, self.dropout)

    def __getitem__(self, index: Any) -> Any:
        leading = not isinstance(index, (tuple, slice)) or (isinstance(index, tuple) and len(index) == 1)
        if self.base.dim() == 3 and (leading or isinstance(index, slice)):
            return self.with_parts(lambda part: part[index])
        return self.dense("__getitem__")[index]

    def transpose(self, first: int, second: int) -> Any:
        n = self.base.dim()
        if {first % n, second % n} == {n - 2, n - 1}:
            return Factored(self.base.mT, self.right.mT, self.left.mT, self.scale, self.dropout)
        return self.dense("transpose").transpose(first, second)

    def t(self) -> Any:
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        return self.transpose(-2, -1) if self.base.dim() == 2 else self.dense("T").T

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    def to(self, *args: Any, **kwargs: Any) -> Factored:
        return self.with_parts(lambda part: part.to(*args, **kwargs))

    def contiguous(self) -> Factored:
        return self.with_parts(lambda part: part.contiguous())

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base if name in _METADATA else self.dense(name), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = "grouped_mm" if "grouped_mm" in str(func) else getattr(func, "__name__", str(func))
        shortcut = _SHORTCUTS.get(name)
        if shortcut is not None:
            done = shortcut(func, args, kwargs)
            if done is not None:
                return done

        def formed(value: Any) -> Any:
            return value.dense(name) if isinstance(value, Factored) else value

        return func(*tree_map(formed, args), **tree_map(formed, kwargs))


def _linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """x (..., m), w (n, m): y = x w^T + s (x right^T) left^T."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, w, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(w, Factored) or not isinstance(x, Tensor):
        return None
    y: Tensor = F.linear(x, w.base, bias)
    delta: Tensor = (w.dropped(x, w.right.dtype) @ w.right.mT) @ w.left.mT
    return y + w.scale * delta.to(y.dtype)


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One factored operand: x w = x base + s (x left) right, or w x = base x + s left (right x)."""
    if kwargs or len(args) != 2:
        return None
    a, b = reversed(args) if getattr(func, "__name__", "") == "__rmatmul__" else args
    if isinstance(b, Factored) and isinstance(a, Tensor):
        y: Tensor = torch.matmul(a, b.base)
        return y + b.scale * ((b.dropped(a, b.left.dtype) @ b.left) @ b.right).to(y.dtype)
    if isinstance(a, Factored) and isinstance(b, Tensor):
        y = torch.matmul(a.base, b)
        return y + a.scale * (a.left @ (a.right @ a.dropped(b, a.left.dtype))).to(y.dtype)
    return None


def _added(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """addmm or baddbmm with the factored weight on the right: c + x w."""
    if kwargs or len(args) != 3 or not isinstance(args[2], Factored) or not isinstance(args[1], Tensor):
        return None
    c, x = args[:2]
    w: Factored = args[2]
    y: Tensor = func(c, x, w.base)
    delta: Tensor = (w.dropped(x, w.left.dtype) @ w.left) @ w.right
    return y + w.scale * delta.to(y.dtype)


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


_SHORTCUTS: dict[str, Callable[..., Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _added),
    "grouped_mm": _grouped,
}
