"""A table of tokens with some rows changed, which is never formed: a lookup and a product each get the change added.

    W' = W + S (R - W[ids]),   S (vocabulary, tokens) one-hot at `ids`, R (tokens, width) the trained rows

The values of rows are trained, as fp32 copies of the base's: W' has them exactly, and is W while they are W's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters._attach.factored import _METADATA, Factored, answered, formed_densely
from adapters._attach.scaled import ScaledWeight
from adapters._fourbit import Packed, Readable, as_dense

Stored: TypeAlias = "Readable | Factored | ScaledWeight | Revised"


class Revised:
    """Stands in for `base` (vocabulary, width), the raw `table` with whatever else acts on it, at the rows `ids`."""

    def __init__(self, base: Stored, ids: Tensor, rows: Tensor, table: Tensor) -> None:
        self.base: Any = base
        self.ids, self.rows, self.table = ids, rows, table

    @property
    def change(self) -> Tensor:
        """R - W[ids], (tokens, width), in fp32 or wider."""
        return _wide(self.rows) - _wide(self.table.detach()[self.ids])

    def dense(self, asked_by: str = "dense") -> Tensor:
        formed_densely[asked_by] += isinstance(self.base, Tensor | Packed)
        whole: Tensor = as_dense(self.base) if isinstance(self.base, Tensor | Packed) else self.base.dense(asked_by)
        return whole.index_copy(0, self.ids, (_wide(whole[self.ids]) + self.change).to(whole.dtype))

    def __getitem__(self, index: Any) -> Any:
        return self.dense("__getitem__")[index]

    def __matmul__(self, other: Any) -> Any:
        return self.dense("__matmul__") @ other

    def __rmatmul__(self, other: Any) -> Any:
        return other @ self.dense("__rmatmul__")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base if name in _METADATA else self.dense(name), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return answered(cls, _SHORTCUTS, func, args, kwargs)


def rows_key(slot: str, parameter: str) -> str:
    """The name of an adapter's rows among the entries of a module that holds their table."""
    return f"{slot}-{parameter}-rows"


class NewRows(nn.Module):
    """The trained rows of one table: stands in for the parameter, at every module that holds it, while they act."""

    ids: Tensor

    def __init__(self, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.register_buffer("ids", torch.tensor(ids, device=rows.device), persistent=False)

    def forward(self, stored: Stored, table: Tensor) -> Revised:
        return Revised(stored, self.ids, self.rows, table)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}rows" in state_dict:  # a base's state dict has none, which is no error of it
            super()._load_from_state_dict(state_dict, prefix, *args)


def _looked_up(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Rows of the base's, and at these tokens the changed ones; the padding's takes no gradient."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    given = dict(zip(names, args, strict=False)) | kwargs
    ids, w, padding = given.get("input"), given.get("weight"), given.get("padding_idx")
    if not isinstance(w, Revised) or not isinstance(ids, Tensor):
        return None
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None
    rest = {name: value for name, value in given.items() if name not in ("input", "weight")}
    y: Tensor = func(ids, w.base, **rest)
    sought = ids.to(w.ids.dtype).contiguous()
    position = torch.searchsorted(w.ids, sought).clamp(max=w.ids.numel() - 1)
    hit = (w.ids[position] == sought)[..., None]
    change = F.embedding(position, w.change)
    if padding is not None:
        change = torch.where((sought == padding % w.table.shape[0])[..., None], change.detach(), change)
    return torch.where(hit, (_wide(y) + change).to(y.dtype), y)


def _linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """x (..., width): the logits of these tokens get x (R - W[ids])^T added; the others stay as they are."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, w = given.get("input"), given.get("weight")
    if not isinstance(w, Revised) or not isinstance(x, Tensor):
        return None
    y: Tensor = func(x, w.base, given.get("bias"))
    # a matrix on two axes: torch folds the rows of `x`, and rounds, by whether the other requires a gradient
    change = x.reshape(-1, x.shape[-1]) @ w.change.to(x.dtype).mT
    # in place: `y` was made here, nobody else holds it, and logits are the largest tensor of a forward
    return y.index_add_(-1, w.ids, change.to(y.dtype).view(*y.shape[:-1], -1))


_SHORTCUTS: dict[str, Callable[..., Tensor | None]] = {"embedding": _looked_up, "linear": _linear}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
