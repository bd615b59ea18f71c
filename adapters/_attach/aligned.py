"""Turns what reaches a site so that its first axis counts the rows of the batch, and back.

axis a           (.., rows, ..)            -> moved to the front
flattened a      (.., rows * m, ..)        -> (rows, .., m, ..), also "windowed"
interleaved a    (.., m * rows, ..)        -> (rows, .., m, ..)
"""

from __future__ import annotations

from torch import Tensor

from adapters._contract import Rows
from adapters._errors import AdapterError


def by_row(x: Tensor, rows: Rows, count: int, where: str) -> Tensor:
    """`x` with an axis of `count` rows at the front.

    Raises:
        AdapterError: what reached the site is not laid out as the probe saw it.
    """
    axis = rows.axis
    size = x.shape[axis] if x.dim() > axis else 0
    if rows.layout == "axis" and size == count:
        return x if axis == 0 else x.movedim(axis, 0)
    if rows.layout in ("flattened", "windowed") and size and size % count == 0:
        return _parted(x, axis, count, size // count).movedim(axis, 0)
    if rows.layout == "interleaved" and size and size % count == 0:
        return _parted(x, axis, size // count, count).movedim(axis + 1, 0)
    raise AdapterError(
        f"{tuple(x.shape)} reached {where}, where the rows of a batch of {count} were expected as {rows}: activate one "
        "adapter at a time for such a batch."
    )


def _parted(x: Tensor, axis: int, outer: int, inner: int) -> Tensor:
    return x.reshape(*x.shape[:axis], outer, inner, *x.shape[axis + 1 :])


def put_back(x: Tensor, rows: Rows) -> Tensor:
    """The inverse of `by_row`, for a tensor of the same axes."""
    axis = rows.axis
    if rows.layout == "axis":
        return x if axis == 0 else x.movedim(0, axis)
    inside = x.movedim(0, axis + 1 if rows.layout == "interleaved" else axis)
    return inside.flatten(axis, axis + 1)
