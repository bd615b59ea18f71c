"""`adapters.peft_config`: our methods for trainers that take a `peft_config=`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adapters._attach import make_method
from adapters._contract import Method
from adapters._errors import AdapterError
from adapters._sites import SiteMap


def peft_config(
    method: str | Method = "lora",
    *,
    targets: str | Iterable[str] | None = None,
    head: bool | Iterable[str] | None = None,
    tokens: str | Iterable[str | int] | None = None,
    tokenizer: Any = None,
    example: Mapping[str, Any] | None = None,
    sites: SiteMap | None = None,
    dtype: torch.dtype = torch.float32,
    **hyperparameters: Any,
) -> Any:
    """A `peft.PeftConfig` of one of our methods: `get_peft_model` and every trainer that takes one attach with it.

    Args:
        method: a name from `adapters.methods.names()` with its hyperparameters, or a method.
        targets, head, tokens, tokenizer, example, sites, dtype: as for `adapters.attach`.
        hyperparameters: fields of the method.

    Raises:
        AdapterError: peft is not installed, or the method has no such field.

    Example:
        >>> import adapters
        >>> adapters.peft_config("bottleneck", reduction_factor=8).method.reduction_factor
        8
    """
    chosen = make_method(method, hyperparameters)
    try:
        import peft  # noqa: F401 - first, because what waits for it imports the configuration
    except ModuleNotFoundError as error:
        raise AdapterError("peft_config needs peft: run `pip install peft`, or use adapters.attach.") from error
    from adapters._bridge.config import AdaptersConfig

    named = (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets)
    heads = head if head is None or isinstance(head, bool) else tuple([head] if isinstance(head, str) else head)
    marked = [tokens] if isinstance(tokens, str) else None if tokens is None else list(tokens)
    live = {"tokenizer": tokenizer, "example": example, "sites": sites}
    return AdaptersConfig(method=chosen, targets=named, head=heads, tokens=marked, dtype=dtype, **live)
