"""Weights in 4 bits: recognising and reading them, and multiplying with them where code reads them as parameters."""

from adapters._fourbit.packed import Packed, Readable, as_dense, read_as, stored_or_packed
from adapters._fourbit.params import (
    bytes_of,
    dequantize,
    elements,
    guard_against_repacking,
    is_quantized,
    quantized_modules,
    quantized_parameters,
    quantized_stacks,
    replace_module,
    shape_of,
)
from adapters._fourbit.right import gives_back

__all__ = [
    "Packed",
    "as_dense",
    "bytes_of",
    "dequantize",
    "elements",
    "gives_back",
    "guard_against_repacking",
    "is_quantized",
    "quantized_modules",
    "quantized_parameters",
    "quantized_stacks",
    "read_as",
    "Readable",
    "replace_module",
    "shape_of",
    "stored_or_packed",
]
