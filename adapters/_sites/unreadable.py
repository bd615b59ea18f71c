"""Layers whose weights are held in a way that nothing here reads, told by what they hold, whatever made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn

from adapters._coded import is_coded
from adapters._eightbit import requantizes
from adapters._sites.aside import Unreached

UNREADABLE = "which this library cannot read: load the base in 16 bits or with quantize='nf4'"
_FLOATS_IN_8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_CODES = {torch.int8, torch.uint8, torch.int16, torch.int32, *(getattr(torch, each) for each in _FLOATS_IN_8)}


def unreadable(modules: Mapping[str, nn.Module]) -> dict[str, Unreached]:
    """The layers, by path, that hold codes which `adapters._coded` does not know, such as GPTQ's, AWQ's or HQQ's."""
    found = {path: _why(module) for path, module in modules.items()}
    return {path: Unreached(path, f"{why[0]}, {UNREADABLE}", why[1]) for path, why in found.items() if why is not None}


def refusal(left: Iterable[Unreached]) -> str:
    """What a refusal says of them: a sentence on the first, or nothing."""
    first = next((each for each in left if each.reason.endswith(UNREADABLE)), None)
    return f"{first.path} {first.reason}" if first is not None else ""


def _why(module: nn.Module) -> tuple[str, int] | None:
    name = type(module).__name__
    weight = module._parameters.get("weight")
    if weight is not None and requantizes(module):
        return f"makes 8-bit codes of its weight as it goes ({name} with llm_int8_has_fp16_weight)", weight.numel()
    every = [t for t in chain(module._parameters.values(), module._buffers.values()) if t is not None]
    matrices = [t for t in every if t.dim() > 1]
    if not matrices or any(True for _ in module.children()):  # which has masks of bytes, as old attentions do
        return None
    largest = max(matrices, key=Tensor.numel)  # beside codes there are scales, fewer than these
    scaled = isinstance(largest, nn.Parameter) or any(t.is_floating_point() for t in every if t is not largest)
    if largest.dtype not in _CODES or is_coded(largest) or not scaled:
        return None
    return f"holds its weight in {largest.dtype} ({name})", _size(module, largest)


def _size(module: nn.Module, codes: Tensor) -> int:
    """How many weights a layer has, whose codes may lie several in one element."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return prod(sizes) if all(isinstance(size, int) for size in sizes) else codes.numel()  # type: ignore[arg-type]
