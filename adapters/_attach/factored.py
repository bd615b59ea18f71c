"""A weight that is read, not called: `w + scale * left @ right` that is multiplied without ever being formed.

Fused experts index, transpose and multiply their parameter in many ways. This stand-in follows the indexing and the
transpositions; `products` turns each product into the base's plus two thin ones. What cannot be followed is formed
densely, and counted: a count that grows is a lost shortcut, never a wrong result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from adapters._fourbit import Readable, as_dense

formed_densely: Counter[str] = Counter()  # how often, by the function that asked
Shortcut: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Tensor | None]
shortcuts: dict[str, Shortcut] = {}  # by the name of the torch function; None: not in this case

_METADATA = frozenset(
    {"shape", "dtype", "device", "ndim", "dim", "size", "numel", "layout", "is_cuda", "is_meta", "stride"}
    | {"is_contiguous", "element_size", "data_ptr", "is_floating_point", "requires_grad"}
    | {"untyped_storage", "storage_offset"}
)


class Factored:
    """`base + scale * left @ right`: base (..., n, m), left (..., n, rank), right (..., rank, m), in storage order.

    A kernel, base (n, channels, *kernel), is seen as a matrix of m = channels * positions columns. `dropout` is the
    probability with which elements of what is multiplied with the change are zeroed.
    """

    def __init__(self, base: Readable, left: Tensor, right: Tensor, scale: float, dropout: float = 0.0) -> None:
        self.base: Any = base  # a tensor, or what stands for one in 4 bits
        self.left, self.right, self.scale, self.dropout = left, right, scale, dropout

    @property
    def kernel(self) -> bool:
        """Whether the base has more axes than its factors."""
        return bool(self.base.dim() > self.left.dim())

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        return F.dropout(x, self.dropout) if self.dropout else x

    def dense(self, asked_by: str = "dense") -> Tensor:
        formed_densely[asked_by] += 1
        change = (self.scale * (self.left @ self.right)).to(self.base.dtype)
        whole: Tensor = as_dense(self.base)
        return whole + (change.view(whole.shape) if self.kernel else change)

    def with_parts(self, change: Callable[[Any], Any]) -> Factored:
        return Factored(change(self.base), change(self.left), change(self.right), self.scale, self.dropout)

    def __getitem__(self, index: Any) -> Any:
        leading = not isinstance(index, (tuple, slice)) or (isinstance(index, tuple) and len(index) == 1)
        if self.base.dim() == 3 and not self.kernel and (leading or isinstance(index, slice)):
            return self.with_parts(lambda part: part[index])
        return self.dense("__getitem__")[index]

    def transpose(self, first: int, second: int) -> Any:
        n = self.base.dim()
        if {first % n, second % n} == {n - 2, n - 1} and not self.kernel:
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
        return answered(cls, shortcuts, func, args, kwargs)


def answered(
    cls: type[Any],
    shortcuts: Mapping[str, Shortcut],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> Any:
    """What a torch function gives for arguments of `cls`, which stands in for a weight: by a shortcut, else densely."""
    kwargs = dict(kwargs or {})
    name = "grouped_mm" if "grouped_mm" in str(func) else getattr(func, "__name__", str(func))
    shortcut = shortcuts.get(name)
    done = shortcut(func, args, kwargs) if shortcut is not None else None
    if done is not None:
        return done

    def formed(value: Any) -> Any:
        return value.dense(name) if isinstance(value, cls) else value

    return func(*tree_map(formed, args), **tree_map(formed, kwargs))
