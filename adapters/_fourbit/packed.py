"""A 4-bit weight that code reads as a parameter: dequantised for each product, and again for its gradient, never kept.

What multiplies by it is what autograd would keep the dense weight for; these products keep the packed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adapters._fourbit.params import dequantize, is_quantized, shape_of

_seen_as: list[Callable[[nn.Parameter], Tensor]] = []  # while a model is traced, reads give dense weights instead


class Packed:
    """A weight in 4 bits, or one matrix of a stack of them, or its transpose, in the dtype it was quantised from."""

    __slots__ = ("index", "parameter", "turned")

    def __init__(self, parameter: nn.Parameter, index: int | None = None, turned: bool = False) -> None:
        self.parameter, self.index, self.turned = parameter, index, turned

    def dense(self) -> Tensor:
        whole = dequantize(self.parameter) if self.index is None else _slice(self.parameter, self.index)
        return whole.mT if self.turned else whole

    @property
    def shape(self) -> torch.Size:
        sizes = shape_of(self.parameter) if self.index is None else shape_of(self.parameter)[1:]
        return torch.Size((*sizes[:-2], sizes[-1], sizes[-2]) if self.turned else sizes)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.parameter.quant_state.dtype  # type: ignore[attr-defined]
        return found

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return False

    def dim(self) -> int:
        return len(self.shape)

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def contiguous(self) -> Packed:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
        return self if not wanted or wanted[0] == self.dtype else self.dense().to(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
        if single and self.index is None and len(self.shape) == 3:
            return Packed(self.parameter, int(index), self.turned)
        return self.dense()[index]

    def transpose(self, first: int, second: int) -> Any:
        n = len(self.shape)
        if {first % n, second % n} == {n - 2, n - 1}:
            return Packed(self.parameter, self.index, not self.turned)
        return self.dense().transpose(first, second)

    def t(self) -> Any:
        return self.transpose(-2, -1)

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        return self.transpose(-2, -1) if len(self.shape) == 2 else self.dense().T

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = "grouped_mm" if "grouped_mm" in str(func) else getattr(func, "__name__", str(func))
        product = _PRODUCTS.get(name)
        done = product(func, args, kwargs) if product is not None else None
        if done is not None:
            return done
        return func(*tree_map(as_dense, args), **tree_map(as_dense, kwargs))


Readable: TypeAlias = Tensor | Packed


def as_dense(value: Any) -> Any:
    """A packed weight formed, anything else as it is."""
    return value.dense() if isinstance(value, Packed) else value


def stored_or_packed(parameter: Any) -> Any:
    """What reading a parameter gives: itself, or, where it is in 4 bits, what stands for its weight."""
    if not is_quantized(parameter):
        return parameter
    return _seen_as[-1](parameter) if _seen_as else Packed(parameter)


@contextmanager
def read_as(dense: Callable[[nn.Parameter], Tensor]) -> Iterator[None]:
    """Gives who reads a 4-bit parameter meanwhile what `dense` makes of it."""
    _seen_as.append(dense)
    try:
        yield
    finally:
        _seen_as.pop()


def _slice(parameter: nn.Parameter, index: int) -> Tensor:
    """One matrix of a stack, without the others: its codes and scales lie together."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state: Any = parameter.quant_state  # type: ignore[attr-defined]
    rows, columns = shape_of(parameter)[1:]
    size, block = rows * columns, int(state.blocksize)
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    own = QuantState(
        absmax=scales.float()[index * size // block : (index + 1) * size // block],
        shape=torch.Size((rows, columns)),
        code=state.code,
        blocksize=block,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    codes = parameter.data.reshape(-1)[index * size // 2 : (index + 1) * size // 2]
    found: Tensor = dequantize_4bit(codes.reshape(-1, 1), quant_state=own)
    return found


class _Product(torch.autograd.Function):
    """y = multiply(x, w) for a frozen w in 4 bits; dx = multiply_back(dy, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Packed, multiply: Any, multiply_back: Any) -> Tensor:
        ctx.w, ctx.back, ctx.shape = w, multiply_back, x.shape
        made: Tensor = multiply(x, w.dense())
        return made

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(dy, ctx.w.dense()).reshape(ctx.shape), None, None, None


def _apply(x: Tensor, w: Packed, multiply: Any, multiply_back: Any) -> Tensor:
    made: Tensor = _Product.apply(x, w, multiply, multiply_back)  # type: ignore[no-untyped-call]
    return made


def _linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, w, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(w, Packed) or not isinstance(x, Tensor):
        return None
    y = _apply(x, w, F.linear, torch.matmul)
    return y if bias is None else y + bias


def _matmul(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if kwargs or len(args) != 2:
        return None
    a, b = reversed(args) if getattr(func, "__name__", "") == "__rmatmul__" else args
    if isinstance(b, Packed) and isinstance(a, Tensor) and a.dim() >= b.dim():
        return _apply(a, b, torch.matmul, lambda dy, w: torch.matmul(dy, w.mT))
    if isinstance(a, Packed) and isinstance(b, Tensor) and b.dim() >= a.dim():
        return _apply(b, a, lambda x, w: torch.matmul(w, x), lambda dy, w: torch.matmul(w.mT, dy))
    return None


def _grouped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if len(args) < 2 or not isinstance(args[1], Packed) or not isinstance(args[0], Tensor):
        return None
    rest = args[2:]
    return _apply(
        args[0],
        args[1],
        lambda x, w: func(x, w, *rest, **kwargs),
        lambda dy, w: func(dy.contiguous(), w.mT, *rest, **kwargs),
    )


_PRODUCTS: dict[str, Callable[..., Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"), _matmul),
    "grouped_mm": _grouped,
}
