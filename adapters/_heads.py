"""Where a Hugging Face model ends and its heads begin."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_model(model: nn.Module) -> nn.Module | None:
    """The part below the heads, by `base_model_prefix`; None for a bare model, which is its own base.

    A bare model may have a part of that name as well, such as the layers of a DINOv3, which lies above the embeddings.
    """
    found = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(found, nn.Module):
        return None
    entry = _asked(model, "get_input_embeddings")
    inside = entry is None or any(module is entry for module in found.modules())
    return found if inside or not any(module is entry for module in model.modules()) else None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a language model, which makes logits over the vocabulary."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, name: str) -> nn.Module | None:
    getter: Any = getattr(model, name, None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # how models say that they have none
        found = None
    return found if isinstance(found, nn.Module) else None
