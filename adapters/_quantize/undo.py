"""Dense layers and parameters in place of those in 4 bits, as a merge needs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters._coded import decoded
from adapters._fourbit import dequantize, quantized_stacks
from adapters._layers import is_conv1d
from adapters._quantize.stacks import BASE, settle

ORIGINAL = "adapters_original"  # in a 4-bit layer's __dict__: the layer that it replaced, without its weight


def dense_module(module: nn.Module, merged: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The layer that a 4- or 8-bit one replaced, with the merged weight (n_out, n_in), or else the dequantised one.

    A layer that transformers quantised becomes one of the class that it notes, one of others torch's own.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    dense = (merged if merged is not None else decoded(module, weight)).to(dtype)
    bias = offset if offset is not None else module._parameters.get("bias")
    original: Any = module.__dict__.get(ORIGINAL)
    if original is not None:
        plain: nn.Module = copy.copy(original)
        plain.__dict__["_parameters"] = dict(original._parameters)
    else:
        plain = _empty(getattr(module, "source_cls", None), dense, bias is not None)
    dense = dense.mT.contiguous() if is_conv1d(plain) else dense
    plain._parameters["weight"] = nn.Parameter(dense, requires_grad=False)
    if bias is not None:
        name = getattr(module, "adapters_bias", "bias")
        plain._parameters[name] = nn.Parameter(bias.detach().to(dense.dtype), requires_grad=False)
    return plain


def _empty(noted: Any, w: Tensor, bias: bool) -> nn.Module:
    n_out, n_in = w.shape
    with torch.device("meta"):
        made: nn.Module = nn.Linear(n_in, n_out, bias=bias)
        if getattr(noted, "__name__", "") == "Conv1D" and bias:  # it has always one
            made = noted(n_out, n_in)
    return made


def forget_quantizer(model: nn.Module) -> None:
    """Takes away what transformers notes of a model that it quantises: with it a dense one is saved as what it was."""
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        vars(model).pop(name, None)
    for config in {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}.values():
        vars(config).pop("quantization_config", None)


def restore_stacks(model: nn.Module, merged: Mapping[str, Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """Makes parameters that code reads dense, merged ones given by path; returns what puts the packed ones back.

    The modules keep their class, which reads dense parameters as well, until `settle`.
    """
    old: list[tuple[nn.Module, str, nn.Parameter]] = []

    def undo() -> None:
        for module, name, parameter in old:
            module._parameters[name] = parameter

    for path, module, name in list(quantized_stacks(model)):
        parameter = module._parameters[name]
        assert parameter is not None
        old.append((module, name, parameter))
        dense = merged[path] if path in merged else dequantize(parameter)
        module._parameters[name] = nn.Parameter(dense.to(dtype).contiguous(), requires_grad=False)
    return undo


def settle_stacks(model: nn.Module) -> None:
    """Gives modules that hold nothing in 4 bits any more their own class back."""
    for module in model.modules():
        if hasattr(type(module), BASE):
            settle(module)
