"""Lets bitsandbytes store fake tensors in 4 bits, whose own class of parameters can hold none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters._errors import AdapterError
from adapters._fourbit import gives_back


@contextmanager
def packing_fakes() -> Iterator[None]:
    """Meanwhile a `Params4bit` is a parameter that is quantised when it is made, not when it moves."""
    from bitsandbytes import nn as theirs

    places = (theirs, theirs.modules)
    before = theirs.Params4bit
    for place in places:
        place.Params4bit = _packed
    try:
        yield
    finally:
        for place in places:
            place.Params4bit = before


def _packed(data: Tensor, requires_grad: bool = False, module: Any = None, **how: Any) -> nn.Parameter:
    if data.device.type == "meta":
        return nn.Parameter(data, requires_grad=False)
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(data, compress_statistics=how["compress_statistics"], quant_type=how["quant_type"])
    made = nn.Parameter(codes, requires_grad=False)
    made.quant_state = state  # type: ignore[attr-defined]
    if module is not None:
        module.quant_state = state
    return made


def warm(model: nn.Module) -> None:
    """Asks bitsandbytes' real kernels what is asked once and kept; its tables would be fake ones otherwise.

    Args:
        model: on the meta device.

    Raises:
        AdapterError: bitsandbytes is missing.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise AdapterError("4 bits need bitsandbytes: pip install 'adapter-registry[quantize]'.") from error
    for parameter in model.parameters():
        for width in parameter.shape if parameter.dim() > 1 else ():
            gives_back(width, parameter.dtype, torch.device("cpu"))
    first = next(model.parameters())
    from bitsandbytes.functional import quantize_4bit

    quantize_4bit(torch.zeros(64, 64, dtype=first.dtype), compress_statistics=True, quant_type="nf4")
