"""A weight that is read, not called, with its rows and columns scaled, which is never formed.

The stand-in for fused experts that a method scales: it follows indexing and transposition as `Factored` does, and
scales what enters and leaves each product instead of the weight. What it cannot follow it forms densely, and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters._attach.factored import _METADATA, Factored, answered, formed_densely
from adapters._fourbit import Readable, as_dense


class ScaledWeight:
    """`diag(rows) base diag(columns)`: base (..., n, m), rows (..., n), columns (..., m) or None, in storage order."""

    def __init__(self, base: Readable | Factored, rows: Tensor | None, columns: Tensor | None) -> None:
        self.base, self.rows, self.columns = base, rows, columns

    def dense(self, asked_by: str = "dense") -> Tensor:
        base = self.base.dense(asked_by) if isinstance(self.base, Factored) else as_dense(self.base)
        formed_densely[asked_by] += not isinstance(self.base, Factored)
        scaled = base if self.rows is None else base * self.rows.unsqueeze(-1)
        return (scaled if self.columns is None else scaled * self.columns.unsqueeze(-2)).to(base.dtype)

    def with_parts(self, change: Callable[[Any], Any]) -> ScaledWeight:
        rows, columns = (None if part is None else change(part) for part in (self.rows, self.columns))
        return ScaledWeight(change(self.base), rows, columns)

    def __getitem__(self, index: Any) -> Any:
        leading = not isinstance(index, tuple) or len(index) == 1
        if self.base.dim() == 3 and leading:
            return self.with_parts(lambda part: part[index])
        return self.dense("__getitem__")[index]

    def transpose(self, first: int, second: int) -> Any:
        n = self.base.dim()
        if {first % n, second % n} == {n - 2, n - 1}:
            return ScaledWeight(self.base.mT, self.columns, self.rows)
        return self.dense("transpose").transpose(first, second)

    def t(self) -> Any:
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        return self.transpose(-2, -1) if self.base.dim() == 2 else self.dense("T").T

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    def to(self, *args: Any, **kwargs: Any) -> ScaledWeight:
        return self.with_parts(lambda part: part.to(*args, **kwargs))

    def contiguous(self) -> ScaledWeight:
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
        return answered(cls, _SHORTCUTS, func, args, kwargs)


def _times(x: Tensor, scales: Tensor | None) -> Tensor:
    return x if scales is None else (x * scales).to(x.dtype)


def _rescaled(y: Tensor, scales: Tensor | None, added: Tensor | None) -> Tensor:
    """`scales * product + added`, from `y = product + added`: the sum comes out of one kernel, as the base's does."""
    if scales is None or added is None:
        return _times(y, scales)
    return torch.addcmul(added - scales * added, y, scales).to(y.dtype)


def _across(scales: Tensor | None) -> Tensor | None:
    """For the last dimension of what a weight, or each weight of a stack, is multiplied with."""
    return None if scales is None else scales.unsqueeze(-2)


def _down(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.unsqueeze(-1)


def _linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """x (..., m), w (n, m): y = rows * ((columns * x) base^T) + bias."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, w, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(w, ScaledWeight) or not isinstance(x, Tensor):
        return None
    return _rescaled(F.linear(_times(x, w.columns), w.base, bias), w.rows, bias)  # type: ignore[arg-type]


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One scaled operand: x w = ((x * rows) base) * columns, or w x = rows * (base (columns * x))."""
    if kwargs or len(args) != 2:
        return None
    a, b = reversed(args) if getattr(func, "__name__", "") == "__rmatmul__" else args
    if isinstance(b, ScaledWeight) and isinstance(a, Tensor) and a.dim() > 1:
        return _times(torch.matmul(_times(a, _across(b.rows)), b.base), _across(b.columns))  # type: ignore[arg-type]
    if isinstance(a, ScaledWeight) and isinstance(b, Tensor) and b.dim() > 1:
        return _times(torch.matmul(a.base, _times(b, _down(a.columns))), _down(a.rows))  # type: ignore[arg-type]
    return None


def _added(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """addmm or baddbmm with the scaled weight on the right: c + x w."""
    if kwargs or len(args) != 3 or not isinstance(args[2], ScaledWeight) or not isinstance(args[1], Tensor):
        return None
    c, x, w = args
    return _rescaled(func(c, _times(x, _across(w.rows)), w.base), _across(w.columns), c)


def _grouped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """x (tokens, n) sorted by expert, w (experts, n, m), offs (experts,) where each expert's tokens end."""
    offs = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if len(args) < 2 or not isinstance(args[1], ScaledWeight) or not isinstance(args[0], Tensor) or offs is None:
        return None
    x, w = args[:2]
    expert = torch.searchsorted(offs, torch.arange(x.shape[0], device=x.device, dtype=offs.dtype), right=True)
    expert = expert.clamp(max=offs.shape[0] - 1)  # rows behind the last expert's are padding

    def of_each(scales: Tensor | None) -> Tensor | None:
        return None if scales is None else scales[expert]

    return _times(func(_times(x, of_each(w.rows)), w.base, *args[2:], **kwargs), of_each(w.columns))


def _looked_up(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A table (n, m): row i is rows[i] * base[i] * columns."""
    given = dict(zip(("input", "weight"), args, strict=False))
    ids, w = given.get("input"), given.get("weight")
    if not isinstance(w, ScaledWeight) or not isinstance(ids, Tensor) or kwargs.get("max_norm") is not None:
        return None
    y: Tensor = func(ids, w.base, *args[2:], **kwargs)
    return _times(_times(y, w.columns), None if w.rows is None else w.rows[ids].unsqueeze(-1))


_SHORTCUTS: dict[str, Callable[..., Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _added),
    "grouped_mm": _grouped,
    "embedding": _looked_up,
}
