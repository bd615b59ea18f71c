"""Whether a model computes with a prefix here what it computes in PEFT, which hands it over as a key-value cache.

That is so for most models, and not for those that place tokens without `position_ids`, that bias attention by
distance, that share keys between layers or keep other states in their cache: tried, and not told from the type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach import detach, install, using
from adapters._contract import KeyValueSite, Method
from adapters._errors import AdapterError
from adapters._evaluating import evaluating
from adapters._sites import example_inputs

NAME = "a prefix on trial"
CLOSE = {torch.float32: 2e-5}  # relative error of the logits; 16 bits have noise of their own
NOISY, PART = 5e-2, 0.3  # of 16 bits, and of what the prefix does


def require_as_cached(
    model: nn.Module, method: Method, sites: Sequence[KeyValueSite], tensors: Mapping[str, Tensor]
) -> None:
    """Runs the base with the prefix as a cache, and with it attached for a moment.

    Args:
        tensors: `(heads, length, dim)` by "path:keys" and "path:values", the sites in the order of PEFT's layers.

    Raises:
        AdapterError: the outputs differ, or the model takes no such cache.
    """
    install(model, NAME, method, sites, {key: tensor.clone() for key, tensor in tensors.items()}, activate=False)
    try:
        require_alike(model, NAME, sites, tensors)
    finally:
        detach(model, NAME)


def require_alike(model: nn.Module, name: str, sites: Sequence[KeyValueSite], tensors: Mapping[str, Tensor]) -> None:
    """The same for a prefix that is attached."""
    ids = example_inputs(model).get("input_ids")
    if not isinstance(ids, Tensor):
        raise AdapterError("PEFT's prefixes are for models that read input_ids.")
    length = next(iter(tensors.values())).shape[1]
    pairs = [(tensors[f"{site.path}:keys"], tensors[f"{site.path}:values"]) for site in sites]
    try:
        with evaluating(model):
            with using(model, None):
                base, cached = _logits(model(input_ids=ids)), _cached(model, ids, length, pairs)
            with using(model, name):
                ours = _logits(model(input_ids=ids))
    except AdapterError:
        raise
    except Exception as error:  # whatever a model may raise that has another cache, or none
        what = str(error).splitlines()[0][:120] if str(error) else ""
        raise AdapterError(
            f"this {type(model).__name__} takes no prefix in its key-value cache, which is how PEFT gives it: "
            f"{type(error).__name__}: {what}"
        ) from error
    off, effect = ((found - cached).norm() / cached.norm() for found in (ours, base))
    close = CLOSE.get(next(model.parameters()).dtype, NOISY)
    if not off <= close or off > PART * effect > 0:
        raise AdapterError(
            f"with a prefix this {type(model).__name__} computes something else than with one in its key-value cache, "
            f"as PEFT gives it: the outputs differ by {off:.1e}, and the prefix changes them by {effect:.1e}."
        )


def _cached(model: nn.Module, ids: Tensor, length: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    from transformers import DynamicCache

    rows, cache = ids.shape[0], DynamicCache()
    parameter = next(model.parameters())
    for layer, pair in enumerate(pairs):
        keys, values = (part.detach().to(parameter)[None].expand(rows, *part.shape) for part in pair)
        cache.update(keys, values, layer)
    mask = torch.ones(rows, length + ids.shape[1], dtype=torch.long, device=ids.device)
    return _logits(model(input_ids=ids, attention_mask=mask, past_key_values=cache))


def _logits(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    result: Tensor = found.float()
    return result
