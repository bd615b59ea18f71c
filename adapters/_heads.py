"""Where a Hugging Face model ends and its heads begin."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_model(model: nn.Module) -> nn.Module | None:
    """The part below the heads, by `base_model_prefix`; None for a bare model, which is its own base."""
    found = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    return found if isinstance(found, nn.Module) else None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a language model, which makes logits over the vocabulary."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # how bare encoders say that they have none
        found = None
    return found if isinstance(found, nn.Module) else None
