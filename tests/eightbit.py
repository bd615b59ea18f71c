"""Bases in 8 bits, made as transformers makes them of `load_in_8bit=True`, and their dense twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

THRESHOLD = 6.0  # transformers' own, above which columns of activations are multiplied in 16 bits


def held(model: nn.Module, threshold: float = THRESHOLD) -> Any:
    """`model` with its linear layers in 8 bits, those outside the base model left as they are."""
    import bitsandbytes as bnb

    inside = set(getattr(model, getattr(model, "base_model_prefix", ""), model).modules())
    for path, module in list(model.named_modules()):
        conv1d = type(module).__name__ == "Conv1D"
        if module not in inside or not (type(module) is nn.Linear or conv1d):
            continue
        weight = module.weight.data.mT.contiguous() if conv1d else module.weight.data.clone()
        n_out, n_in = weight.shape
        with torch.device("meta"):
            new: Any = bnb.nn.Linear8bitLt(n_in, n_out, module.bias is not None, False, threshold)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.data.clone(), requires_grad=False)
        new.source_cls = type(module)
        new.train(module.training)
        model.set_submodule(path, new)
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"}


def by_hand(layer: Any) -> Tensor:
    """Codes times scales, from wherever bitsandbytes keeps them now."""
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.double() * (scales.double() / 127)[:, None]


def dense_twin(model: nn.Module, read: Callable[[Any], Tensor] = by_hand) -> Any:
    """The same model with the weights that the codes stand for in dense layers."""
    twin = copy.deepcopy(model)
    dtype = next(p.dtype for p in twin.parameters() if p.is_floating_point())
    for path, layer in layers(twin).items():
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
        new.weight = nn.Parameter(read(layer).to(dtype), requires_grad=False)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
        twin.set_submodule(path, new.train(layer.training))
    return twin
