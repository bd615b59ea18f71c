"""Layers that are known by their class, without importing the library that defines it."""

from __future__ import annotations

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, the one linear layer of the ecosystem that stores (n_in, n_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not hasattr(module, "in_features")
