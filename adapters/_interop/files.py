"""What an adapter is in PEFT's files: a configuration, and tensors by other names, in other shapes and orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """One of our tensors in PEFT's file: the order of its axes there, and its shape."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PeftFiles:
    """`adapter_config.json`, PEFT's name for each of our tensors, and what differs there.

    Args:
        keys: in the order in which tensors of one name there lie side by side in it.
        shapes: of tensors that PEFT keeps in another shape.
        orders: of tensors whose axes PEFT keeps in another order as well, as it does those of experts.
        notes: what the configuration cannot say.
    """

    config: bytes
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    orders: Mapping[str, Stored] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors as PEFT's file holds them."""
        found: dict[str, list[Tensor]] = {}
        for key, name in self.keys.items():
            tensor, order = tensors[key], self.orders.get(key)
            here = tensor.view(self.shapes.get(key, tensor.shape)) if order is None else as_stored(tensor, order)
            found.setdefault(name, []).append(here)
        return {name: torch.cat(parts, dim=-1).contiguous() for name, parts in found.items()}


def as_stored(tensor: Tensor, how: Stored) -> Tensor:
    """One of our tensors, (experts, ...) or without experts, as PEFT keeps it."""
    stack = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    return stack.permute(how.axes).reshape(how.shape)
