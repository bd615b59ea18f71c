"""Puts together what a model returned for parts of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters._errors import AdapterError

Rows = Sequence[Sequence[int]]  # of each part, the numbers of its rows in the batch


def joined(results: Sequence[Any], rows: Rows) -> Any:
    """The outputs of a batch from those of its parts: tensors by row, in containers of the same kind.

    Raises:
        AdapterError: something does not belong to rows, as a loss.
    """
    first = results[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return _by_row(results, rows)
    if isinstance(first, Mapping):
        return type(first)(**{key: joined([result[key] for result in results], rows) for key in first})
    if isinstance(first, tuple | list):
        return type(first)(joined(parts, rows) for parts in zip(*results, strict=True))
    raise AdapterError(
        f"a {type(first).__name__} that the model returned cannot be put together from parts of a batch."
    )


def joined_sequences(results: Sequence[Any], rows: Rows, pad: int) -> Tensor:
    """Generated sequences, (rows, tokens), filled up at their ends with the token `pad` to the longest.

    Raises:
        AdapterError: more than sequences was asked for.
    """
    if not all(isinstance(result, Tensor) for result in results):
        raise AdapterError(
            "this batch generates once per selection, and only sequences can be put together: leave "
            "return_dict_in_generate off."
        )
    longest = max(result.shape[1] for result in results)
    return _by_row([F.pad(result, (0, longest - result.shape[1]), value=pad) for result in results], rows)


def _by_row(parts: Sequence[Tensor], rows: Rows) -> Tensor:
    """Parts have a row, or as many as every other part, for each of theirs, on one of their axes."""
    axis, times = _rows_axis(parts, rows)
    order = [row * times + i for own in rows for row in own for i in range(times)]
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=parts[0].device)
    return torch.cat(list(parts), axis).index_select(axis, back)


def _rows_axis(parts: Sequence[Tensor], rows: Rows) -> tuple[int, int]:
    """The axis that counts rows, and how many entries a row has there: the fewest, and of those axes the first."""
    found = []
    for axis in range(parts[0].dim()):
        times = {part.shape[axis] / len(own) for part, own in zip(parts, rows, strict=True)}
        rest = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
        if len(times) == len(rest) == 1 and min(times) >= 1 and min(times) == int(min(times)):
            found.append((int(min(times)), axis))
    if not found:
        raise AdapterError(
            "this batch runs once per selection, and a loss over all of its rows cannot be put together from the "
            "parts: leave labels out and compute it from the logits."
        )
    times_a_row, axis = min(found)
    return axis, times_a_row
