"""Linear layers that bitsandbytes holds in 8 bits, a scale for each row: W = codes * scales / 127.

LLM.int8 (arXiv 2208.07339), section 3. bitsandbytes keeps both in the parameter until the layer's first forward, and in
the layer's own state from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters._errors import AdapterError

LARGEST = 127


def in_eight_bits(parameter: object) -> bool:
    """Whether a parameter holds the codes of an 8-bit layer."""
    return isinstance(parameter, Tensor) and parameter.dtype == torch.int8 and hasattr(parameter, "SCB")


def eightbit_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose weight is in 8 bits, with their paths."""
    for path, module in model.named_modules():
        if in_eight_bits(module._parameters.get("weight")):
            yield path, module


def codes_and_scales(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What the layer's next forward multiplies with: codes (n_out, n_in) in int8, scales (n_out) in fp32.

    Raises:
        AdapterError: there are no scales, as in a layer that was pickled before its first forward.
    """
    weight: Any = layer._parameters["weight"]
    state: Any = getattr(layer, "state", None)
    for held in (weight, state):  # in this order: a forward moves what the parameter has into the state
        scales, codes = getattr(held, "SCB", None), getattr(held, "CB", None)
        if scales is not None:
            return (weight.detach() if codes is None else codes.detach()), scales.detach().reshape(-1)
    raise AdapterError(
        f"a {type(layer).__name__} holds 8-bit codes without their scales, so its weight cannot be read: load the base "
        "again."
    )


def dequantize_rows(layer: nn.Module) -> Tensor:
    """The weight of an 8-bit layer as a dense tensor (n_out, n_in), in fp32: no 16-bit format holds every product."""
    codes, scales = codes_and_scales(layer)
    return codes.float().mul_((scales / LARGEST)[:, None])


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Lets 8-bit layers multiply meanwhile without rounding activations, as they do in training on CPUs."""
    held = [(layer, vars(layer).get("forward")) for _, layer in eightbit_modules(model)]
    try:
        for layer, _ in held:
            vars(layer)["forward"] = partial(_product, layer)
        yield
    finally:
        for layer, forward in held:
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def _product(layer: nn.Module, x: Tensor) -> Tensor:
    bias = layer._parameters["bias"]
    return F.linear(x, dequantize_rows(layer).to(x.dtype), None if bias is None else bias.to(x.dtype))


def requantizes(module: nn.Module) -> bool:
    """Whether a layer keeps its weight in 16 bits and makes 8-bit codes of it while it trains."""
    state = getattr(module, "state", None)
    weight = module._parameters.get("weight")
    held = weight is not None and weight.is_floating_point() and hasattr(weight, "SCB")
    return held and bool(getattr(state, "has_fp16_weights", False))
