"""4-bit bases: quantising in place, reading a quantised weight, and the guard against a repacking bug upstream."""

from adapters._quantize.nf4 import QuantizeReport, check_format, quantize
from adapters._quantize.params import (
    dequantize,
    elements,
    guard_against_repacking,
    is_quantized,
    quantized_modules,
    replace_module,
)

__all__ = [
    "QuantizeReport",
    "check_format",
    "dequantize",
    "elements",
    "guard_against_repacking",
    "is_quantized",
    "quantize",
    "quantized_modules",
    "replace_module",
]
