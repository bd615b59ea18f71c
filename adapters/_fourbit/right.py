"""Whether bitsandbytes gives back what it stored.

Its kernel for CPUs with AVX512 does not where a row is no multiple of a block (0.50.2: a row of 96 comes back with
errors as large as the weights), and says nothing.
"""

from __future__ import annotations

from functools import cache

import torch

BLOCK = 64  # elements that share a scale


@cache
def gives_back(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Tries a small matrix of this width against the definition: code times scale, block by block."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.randn(BLOCK, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    packed, state = quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
    bytes_ = packed.reshape(-1)
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(-1).long()
    expected = (state.code[codes].view(-1, BLOCK) * state.absmax[:, None]).view_as(w)
    found = dequantize_4bit(packed, quant_state=state).float()
    # the largest rounding of bf16 is 0.4 % of a value
    return bool((found - expected.float()).abs().max() <= 0.01 * expected.abs().max())
