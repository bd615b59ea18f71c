"""What a forward is called with: the names of its arguments, and the batch that they hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from adapters._attach.acting import Shape

# what may hold a batch, the first that is given: a decoder's own input where an encoder has run already
INPUTS = ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_features", "input_values", "x")
DECODED = ("decoder_input_ids", "decoder_inputs_embeds")


@cache
def forward_parameters(cls: Any) -> tuple[str, ...]:
    """The names of what a class's forward accepts."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def shape_of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shape | None:
    """The rows, tokens and earlier tokens of a call, or None where no tensor is given."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    found = next(_tensors(given), None)
    if found is None:
        return None
    name, batch = found
    sequence = batch.dim() == 3 or (batch.dim() == 2 and name in ("input_ids", "inputs", *DECODED))
    past: Any = given.get("past_key_values")
    before = int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0
    return Shape(batch.shape[0], batch.shape[1] if sequence else 0, before)


def _tensors(given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name in (*INPUTS, *DECODED, *given):
        if isinstance(given.get(name), Tensor) and given[name].dim():
            yield name, given[name]
