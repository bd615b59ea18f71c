"""A Sequential runs its children: the child `adapters` of an adapted one must not be among them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import nn

from adapters._attach.container import CHILD


def without_container(base: type[nn.Sequential]) -> dict[str, Any]:
    """What a subclass of `base` overrides, so that its layers are those of the base."""

    def __iter__(self: nn.Sequential) -> Iterator[nn.Module]:
        return (child for name, child in self._modules.items() if name != CHILD and child is not None)

    def __len__(self: nn.Sequential) -> int:
        return len(self._modules) - (CHILD in self._modules)

    def __getitem__(self: nn.Sequential, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range")
        return next(islice(iter(self), index % count, None))

    return {"__iter__": __iter__, "__len__": __len__, "__getitem__": __getitem__}
