"""Weights that are held as codes, in 4 bits or in 8: recognising and reading them, whichever it is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from adapters._eightbit import dequantize_rows, eightbit_modules, in_eight_bits
from adapters._fourbit import dequantize, is_quantized, quantized_modules


def is_coded(parameter: object) -> bool:
    """Whether a parameter holds codes that `decoded` can read."""
    return is_quantized(parameter) or in_eight_bits(parameter)


def format_of(parameter: object) -> str:
    """ "nf4", "fp4" or "int8"; nothing for a parameter that is no codes."""
    if in_eight_bits(parameter):
        return "int8"
    return str(getattr(getattr(parameter, "quant_state", None), "quant_type", ""))


def bits_of(parameter: object) -> int:
    """4 or 8; 0 for a parameter that is no codes."""
    return 8 if in_eight_bits(parameter) else 4 if is_quantized(parameter) else 0


def formats_in(model: nn.Module) -> tuple[str, ...]:
    """The formats of a model's codes."""
    return tuple(sorted({format_of(parameter) for parameter in model.parameters()} - {""}))


def decoded(owner: nn.Module, parameter: nn.Parameter) -> Tensor:
    """What a module's parameter of codes stands for: dense, in the dtype it was quantised from, or fp32 for 8 bits."""
    return dequantize_rows(owner) if in_eight_bits(parameter) else dequantize(parameter)


def coded_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that own a matrix of codes and are called, with their paths."""
    yield from quantized_modules(model)
    yield from eightbit_modules(model)
