"""What a forward is called with: the names of its arguments, and the batch that they hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from adapters._attach.acting import Shape
from adapters._errors import AdapterError

# what may hold a batch, the first that is given: a decoder's own input where an encoder has run already
INPUTS = ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_features", "input_values", "x")
# tensors whose entries are not those of rows, how many they are
_OF_NO_ROW = frozenset({"logits_to_keep", "num_logits_to_keep", "cache_position", "num_items_in_batch"}) | {
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "head_mask", "bad_words_ids", "eos_token_id")
}
DECODED = ("decoder_input_ids", "decoder_inputs_embeds")


@cache
def forward_parameters(cls: Any) -> tuple[str, ...]:
    """The names of what a class's forward accepts."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward accepts."""
    cls: Any = type(module)  # Any: mypy takes no class of modules for hashable
    return forward_parameters(cls)


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


def of_rows(
    count: int,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    change: Callable[[Tensor], Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with those changed that have a row for each of the batch's.

    Raises:
        AdapterError: which of them belong to a row cannot be told.
    """

    def changed(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or name in _OF_NO_ROW:
            return value
        if name.endswith("grid_thw"):
            raise AdapterError(f"{name} counts images, not rows: a batch with it cannot be repeated or run in parts.")
        if name == "position_ids" and value.dim() == 3 and value.shape[1] == count:  # by kind of position, then by row
            return change(value.transpose(0, 1)).transpose(0, 1)
        return change(value) if value.shape[0] == count else value

    given = (*names, *[""] * (len(args) - len(names)))
    return tuple(map(changed, given, args)), {name: changed(name, value) for name, value in kwargs.items()}
