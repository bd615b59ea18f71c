"""Quantises a model's linear layers in place to nf4 with double quantisation (QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapters._eightbit import eightbit_modules
from adapters._errors import AdapterError, nearest
from adapters._fourbit import (
    bytes_of,
    elements,
    guard_against_repacking,
    is_quantized,
    quantized_parameters,
    replace_module,
)
from adapters._layers import is_conv1d
from adapters._quantize.choose import Choice, choose
from adapters._quantize.stacks import pack
from adapters._quantize.undo import ORIGINAL
from adapters._sites import SiteMap, sites

FORMATS = ("nf4",)


@dataclass(frozen=True)
class QuantizeReport:
    """What was quantised, what was left as it is and why, and the share of weight bytes that are now in 4 bits.

    `quantized` are layers, `stacks` parameters that code reads, such as fused experts; `bytes_quantized` is what both
    took before, of `bytes_before` in all.
    """

    format: str
    quantized: tuple[str, ...]
    already: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)  # path of a weight -> reason
    weights: int = 0  # parameters held in 4 bits
    total: int = 0  # parameters of the model
    bytes_before: int = 0
    bytes_after: int = 0
    stacks: tuple[str, ...] = ()
    bytes_quantized: int = 0
    notes: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """The fraction of the model's bytes, as they were, that was quantised."""
        return self.bytes_quantized / self.bytes_before if self.bytes_before else 0.0

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for path, why in self.left.items():
            reasons.setdefault(why, []).append(path)
        stacks = f" and {len(self.stacks)} stacks of experts" if self.stacks else ""
        head = (
            f"{self.format}: {len(self.quantized)} linear layers{stacks} quantised, {100 * self.fraction:.1f} % of the "
            f"bytes; {self.weights:,} of {self.total:,} parameters in 4 bits; "
            f"{self.bytes_before / 2**20:,.0f} MiB -> {self.bytes_after / 2**20:,.0f} MiB."
        )
        lines = [f"  left as they were ({why}): {len(paths)}, first {paths[0]}" for why, paths in reasons.items()]
        return "\n".join([head, *lines, *(f"  note: {note}" for note in self.notes)])


def quantize(
    model: nn.Module,
    format: str = "nf4",
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    only: Collection[str] | None = None,
    sites: SiteMap | None = None,
    example: Mapping[str, Any] | None = None,
) -> QuantizeReport:
    """Quantises every linear layer of `model` in place, one at a time; heads, routers and embeddings stay as they are.

    Only one layer's weight exists in both forms at a time, so a model that was loaded into host memory reaches
    `device` at its 4-bit size.

    Args:
        model: a model in 16 or 32 bits; layers that are in 4 bits already stay so.
        format: "nf4".
        compute_dtype: dtype of the products with the dequantised weights.
        device: where the model goes; None keeps every layer where it is.
        only: paths of the layers and stacks to quantise; None takes all that can be.
        sites: the model's map, which tells which layers are products and nothing else; without it the model is traced.
        example: keyword arguments of one forward for that, where the probe cannot make them.

    Raises:
        AdapterError: unknown format, bitsandbytes missing, adapters attached, or nothing that could be quantised.
    """
    check_format(format)
    if any(getattr(module, "is_adapter_container", False) for module in model.modules()):
        raise AdapterError("adapters are attached to this model: detach them, quantise, then load them again.")
    _refuse_eight_bits(model, format)
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise AdapterError("nf4 needs bitsandbytes: pip install 'adapter-registry[quantize]'.") from error

    already = tuple(path.removesuffix(".weight") for path, _, _ in quantized_parameters(model))
    before = _bytes(model)
    found, notes = _traced(model, sites, example)
    choice = choose(model, found, device)
    if only is not None:
        _narrow(choice, only)
    if not choice.layers and not choice.stacks and not already:
        raise AdapterError(f"nothing in this model can be quantised: {_first(choice.left)}.")
    parameters = dict(model.named_parameters())
    taken = sum(bytes_of(parameters[path]) for path in choice.stacks)
    for path in choice.layers:
        module = model.get_submodule(path)
        taken += bytes_of(module._parameters["weight"])  # type: ignore[arg-type]
        new = _quantized(module, Linear4bit, compute_dtype, device)
        for alias in [other for other, each in model.named_modules(remove_duplicate=False) if each is module]:
            replace_module(model, alias, new)
    for path in choice.stacks:
        owner, _, name = path.rpartition(".")
        pack(model.get_submodule(owner), name, device)
    if device is not None:
        model.to(device)
    guard_against_repacking(model)
    held = sum(elements(p) for p in model.parameters() if is_quantized(p))
    total = sum(map(elements, model.parameters()))
    sizes = (held, total, before, _bytes(model))
    return QuantizeReport(
        format, tuple(choice.layers), already, choice.left, *sizes, tuple(choice.stacks), taken, tuple(notes)
    )


def check_format(format: str) -> None:
    """Refuses an unknown quantisation by name."""
    if format not in FORMATS:
        eight = " For 8 bits load the base with transformers' BitsAndBytesConfig(load_in_8bit=True)." * ("8" in format)
        raise AdapterError(f"no quantisation {format!r}{nearest(format, FORMATS)} Known: {', '.join(FORMATS)}.{eight}")


def _refuse_eight_bits(model: nn.Module, format: str) -> None:
    for path, _ in eightbit_modules(model):
        raise AdapterError(
            f"{path} is held in int8, and 4 bits are made of 16: load the base in 16 bits or with quantize={format!r}."
        )


def _traced(
    model: nn.Module, found: SiteMap | None, example: Mapping[str, Any] | None
) -> tuple[SiteMap | None, list[str]]:
    """The map given or a fresh one; a model that the probe cannot run is judged by the classes of its layers alone."""
    if found is not None:
        return found, []
    try:
        return sites(model, example), []
    except AdapterError as error:
        if example is not None:
            raise
        return None, [f"only torch's own linear layers were quantised: {error}"]


def _narrow(choice: Choice, only: Collection[str]) -> None:
    choice.left |= {path: "not asked for" for path in (*choice.layers, *choice.stacks) if path not in only}
    choice.layers = [path for path in choice.layers if path in only]
    choice.stacks = [path for path in choice.stacks if path in only]


def _quantized(
    module: nn.Module, linear4bit: Any, compute_dtype: torch.dtype, device: torch.device | str | None
) -> nn.Module:
    from bitsandbytes.nn import Params4bit

    transposed = is_conv1d(module)
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
    # what a merge gives back, whatever its class; the weight is not held twice
    new.__dict__[ORIGINAL] = module
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        getattr(new, hooks).update(getattr(module, hooks))
    module._parameters = dict.fromkeys(module._parameters)
    made: nn.Module = new
    return made


def _bytes(model: nn.Module) -> int:
    return sum(bytes_of(p) for p in model.parameters()) + sum(bytes_of(b) for b in model.buffers())


def _first(left: dict[str, str]) -> str:
    path, why = next(iter(left.items()), ("no weight of two dimensions", "none was found"))
    return f"{path} ({why})"
