"""Where the rows of a batch are in a tensor: found by comparing rows that are alike with one that is not.

The probe's batch has three rows, of which the first and the third are the same and the second is another. In whatever
layout a tensor holds them, what belongs to the first row equals what belongs to the third and differs from the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from adapters._contract import NOWHERE, Rows

ALIKE, OTHER, COUNT = (0, 2), 1, 3  # the probe's rows
Layout: TypeAlias = Literal["axis", "flattened", "windowed", "interleaved"]
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def rows_of(x: Tensor, count: int, features: int = 1) -> Rows:
    """The layout of the probe's `count` rows in `x`, whose last `features` axes are not looked at.

    Three rows cannot be told apart in a batch that has fewer, nor in a tensor that depends on none.
    """
    if count != COUNT or x.device.type == "meta":
        return NOWHERE
    with torch._C.DisableTorchFunction():  # a trace does not record the look at what it records
        for axis, layout, rows in _candidates(x, features):
            first, third = (rows.select(0, row) for row in ALIKE)
            if _equal(first, third) and not _equal(first, rows.select(0, OTHER)):
                return Rows(layout, axis)
    return NOWHERE


def _candidates(x: Tensor, features: int) -> Iterator[tuple[int, Layout, Tensor]]:
    """Each way in which the axes of `x` may hold three rows, with `x` seen so that its first axis is the rows'."""
    leading = range(max(x.dim() - features, 0))
    for axis in leading:
        if x.shape[axis] == COUNT:
            yield axis, "axis", x.movedim(axis, 0)
    for axis in leading:
        if x.shape[axis] > COUNT and x.shape[axis] % COUNT == 0:
            outer: Layout = "flattened" if x.dim() - features == 1 else "windowed"
            yield axis, outer, _split(x, axis, COUNT, -1).movedim(axis, 0)
            yield axis, "interleaved", _split(x, axis, -1, COUNT).movedim(axis + 1, 0)


def _split(x: Tensor, axis: int, first: int, second: int) -> Tensor:
    return x.reshape(*x.shape[:axis], first, second, *x.shape[axis + 1 :])


def _equal(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    size = float(a.abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=_CLOSE.get(a.dtype, 1e-4) * size)
