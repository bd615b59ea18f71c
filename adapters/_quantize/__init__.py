"""4-bit bases: quantising in place, and undoing it for a merge."""

from adapters._quantize.nf4 import QuantizeReport, check_format, quantize
from adapters._quantize.undo import dense_module, forget_quantizer, restore_stacks, settle_stacks

__all__ = [
    "QuantizeReport",
    "check_format",
    "dense_module",
    "forget_quantizer",
    "quantize",
    "restore_stacks",
    "settle_stacks",
]
