"""Quantises a model's linear layers in place to nf4 with double quantisation (QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from adapters._errors import AdapterError, nearest
from adapters._heads import base_model, output_embeddings
from adapters._quantize.params import (
    bytes_of,
    elements,
    guard_against_repacking,
    is_quantized,
    quantized_modules,
    replace_module,
)

FORMATS = ("nf4",)
BLOCK = 64  # elements that share a scale


@dataclass(frozen=True)
class QuantizeReport:
    """What was quantised, what was left as it is and why, and the share of weight bytes that are now in 4 bits."""

    format: str
    quantized: tuple[str, ...]
    already: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)  # path of a weight -> reason
    weights: int = 0  # parameters held in 4 bits
    total: int = 0  # parameters of the model
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for path, why in self.left.items():
            reasons.setdefault(why, []).append(path)
        head = (
            f"{self.format}: {len(self.quantized)} linear layers quantised, {self.weights:,} of {self.total:,} "
            f"parameters in 4 bits; {self.bytes_before / 2**20:,.0f} MiB -> {self.bytes_after / 2**20:,.0f} MiB."
        )
        lines = [f"  left as they were ({why}): {len(paths)}, first {paths[0]}" for why, paths in reasons.items()]
        return "\n".join([head, *lines])


def quantize(
    model: nn.Module,
    format: str = "nf4",
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    only: Collection[str] | None = None,
) -> QuantizeReport:
    """Quantises every linear layer of `model` in place, one at a time; heads and embeddings stay as they are.

    Only one layer's weight exists in both forms at a time, so a model that was loaded into host memory reaches
    `device` at its 4-bit size.

    Args:
        model: a model in 16 or 32 bits; layers that are in 4 bits already stay so.
        format: "nf4".
        compute_dtype: dtype of the products with the dequantised weights.
        device: where the model goes; None keeps every layer where it is.
        only: paths of the layers to quantise; None takes all that can be.

    Raises:
        AdapterError: unknown format, bitsandbytes missing, adapters attached, or nothing that could be quantised.
    """
    check_format(format)
    if any(getattr(module, "is_adapter_container", False) for module in model.modules()):
        raise AdapterError("adapters are attached to this model: detach them, quantise, then load them again.")
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise AdapterError("nf4 needs bitsandbytes: pip install 'adapter-registry[quantize]'.") from error

    already = tuple(path for path, _ in quantized_modules(model))
    before = _bytes(model)
    chosen, left = _choose(model)
    if only is not None:
        left |= {path: "not asked for" for path in chosen if path not in only}
        chosen = [path for path in chosen if path in only]
    if not chosen and not already:
        raise AdapterError(f"nothing in this model can be quantised: {_first(left)}.")
    for path in chosen:
        module = model.get_submodule(path)
        new = _quantized(module, Linear4bit, compute_dtype, device)
        for alias in [other for other, each in model.named_modules(remove_duplicate=False) if each is module]:
            replace_module(model, alias, new)
    if device is not None:
        model.to(device)
    guard_against_repacking(model)
    held = sum(elements(p) for p in model.parameters() if is_quantized(p))
    total = sum(map(elements, model.parameters()))
    return QuantizeReport(format, tuple(chosen), already, left, held, total, before, _bytes(model))


def check_format(format: str) -> None:
    """Refuses an unknown quantisation by name."""
    if format not in FORMATS:
        raise AdapterError(f"no quantisation {format!r}{nearest(format, FORMATS)} Known: {', '.join(FORMATS)}.")


def _choose(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    head, read = _heads(model), _read_elsewhere(model)
    chosen: list[str] = []
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if is_quantized(weight):
            continue
        if weight is not None and weight.dim() == 2 and _linear_forward(module):
            reason = _reason(path, weight, head) or read.get(path, "")
            if reason:
                left[f"{path}.weight"] = reason
            else:
                chosen.append(path)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2 and not isinstance(module, nn.Embedding):
                left[f"{path}.{name}" if path else name] = f"held by a {type(module).__name__}, not by a linear layer"
    return chosen, left


def _reason(path: str, weight: nn.Parameter, head: set[str]) -> str:
    if path in head:
        return "output head"
    if not weight.is_floating_point():
        return f"stored as {weight.dtype}"
    if weight.numel() % BLOCK:
        return f"its size is no multiple of {BLOCK}"
    return ""


def _read_elsewhere(model: nn.Module) -> dict[str, str]:
    """Linear layers whose stored weight others use: they would get 4-bit codes, or their dtype, for a weight."""
    found = {}
    kept = {
        name
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
    }
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if kept.intersection(path.split(".")):
            found[path] = "its model keeps it in fp32"
        elif type(module) is not nn.Linear and isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            found[path] = "torch's fused attention reads its weight"
        elif name.isidentifier() and _mentions(_class(model, parent), name):
            found[path] = "its parent reads its weight"
    return found


def _class(model: nn.Module, path: str) -> Any:
    return type(model.get_submodule(path))


@cache
def _mentions(parent: Any, name: str) -> bool:
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):  # a class made at run time has no source
        return False
    return re.search(rf"self\.{re.escape(name)}\.weight\b", source) is not None


def _linear_forward(module: nn.Module) -> bool:
    # a subclass that overrides `forward` may do more than a product, and would lose it in the exchange
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D is the one linear layer of the ecosystem that stores (n_in, n_out); it has no features fields
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not hasattr(module, "in_features")


def _heads(model: nn.Module) -> set[str]:
    """Modules after the base model: the output embeddings and task heads, whose 4-bit noise would reach every logit."""
    inside, output = set((base_model(model) or model).modules()), output_embeddings(model)
    return {path for path, module in model.named_modules() if module not in inside or module is output}


def _quantized(
    module: nn.Module, linear4bit: Any, compute_dtype: torch.dtype, device: torch.device | str | None
) -> nn.Module:
    from bitsandbytes.nn import Params4bit

    transposed = _is_conv1d(module)
    weight = module._parameters["weight"]
    assert weight is not None
    dense = weight.data.mT.contiguous() if transposed else weight.data
    n_out, n_in = dense.shape
    with torch.device("meta"):
        new: Any = linear4bit(
            n_in, n_out, bias=False, compute_dtype=compute_dtype, compress_statistics=True, quant_type="nf4"
        )
    target = torch.device(device) if device is not None else dense.device
    quantised = Params4bit(dense, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new)
    new.weight = quantised.to(target)
    bias = module._parameters.get("bias")
    # bitsandbytes casts the bias in place at its first forward; doing it here keeps forwards free of side effects
    new.bias = None if bias is None else nn.Parameter(bias.data.to(target, compute_dtype), requires_grad=False)
    new.adapters_transposed = transposed
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        getattr(new, hooks).update(getattr(module, hooks))
    made: nn.Module = new
    return made


def _bytes(model: nn.Module) -> int:
    return sum(bytes_of(p) for p in model.parameters()) + sum(bytes_of(b) for b in model.buffers())


def _first(left: dict[str, str]) -> str:
    path, why = next(iter(left.items()), ("no weight of two dimensions", "none was found"))
    return f"{path} ({why})"
