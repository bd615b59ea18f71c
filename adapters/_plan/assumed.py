"""Answers what a program asks about values, where tensors have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
_ANY = (aten.any.default, aten.any.dim, aten.any.dims)
_SAME = (aten.equal.default, aten.allclose.default)


class Assumed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fake tensors with the values of a batch of full rows: all is true, nothing is out of bounds, every number is 1.

    Attributes:
        found: how many entries the next `nonzero` finds; None: all that it is asked about, as does every other one.
    """

    def __init__(self, found: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self._false: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SAME:
            return True
        if func is aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is aten.nonzero.default:
            x: Tensor = args[0]
            count = x.numel() if self.found is None else min(self.found, x.numel())
            self.found = None
            return x.new_empty((count, x.dim()), dtype=torch.long)
        out = func(*args, **(kwargs or {}))
        if func in _ANY:
            self._false[out] = True
        return out

    def _scalar(self, x: Tensor) -> bool | int | float:
        if x.dtype is torch.bool:
            return x not in self._false
        return 1.0 if x.is_floating_point() else 1


@contextmanager
def as_if_real() -> Iterator[None]:
    """Has transformers leave out a mask that masks nothing, which it keeps where it sees a fake tensor."""
    from transformers.utils import import_utils

    before = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda x: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = before
