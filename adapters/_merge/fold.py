"""Merges an adapter: W <- round(method.weight(W, p)), and proves it by running both models on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach import detach, set_labels, tensors_of, unwrapped, using
from adapters._attach.swap import base_class
from adapters._coded import coded_modules, formats_in
from adapters._fourbit import quantized_stacks, replace_module
from adapters._merge.allowed import Merging, check_requantize, check_untied, mergeable
from adapters._merge.certificate import ROUNDED_ACTIVATIONS, Certificate, of_little_effect, usual_limit
from adapters._merge.exact import dense_dtype, merged_parameters
from adapters._merge.measure import adapted, beside
from adapters._quantize import dense_module, forget_quantizer, quantize, restore_stacks, settle_stacks
from adapters._selection import Part


def merge(
    model: nn.Module,
    name: Part,
    *,
    example: Mapping[str, Any] | None = None,
    prompts: Sequence[str] = (),
    tokenizer: Any = None,
    tolerance: float | None = None,
    requantize: str | None = None,
) -> Certificate:
    """Folds an adapter, or several, into the base and detaches them; the model is then a plain one that behaves so.

    A base in 4 or 8 bits is dequantised first, every layer of it, and becomes a model in the dtype that most of its
    other parameters have.

    Args:
        name: an attached adapter of a method that changes weights, or a `Stack` or `Average` of such, or the name of
            one; no other may be attached.
        example: keyword arguments of one forward on which the merged is compared with the adapted model; without it
            the probe's.
        prompts: texts that both models continue, with the `tokenizer`; their logits are compared as the outputs are,
            and the certificate holds both answers.
        tolerance: the relative error of the outputs above which the merge is refused; by the dtype when None, where a
            base in 8 bits is measured twice, with and without its rounding of activations.
        requantize: "nf4" puts a merged 4-bit base back into 4 bits, which loses most of the adapter's effect; the
            certificate then says how much, whatever the tolerance.

    Raises:
        AdapterError: the method cannot be merged, others are attached, or the error exceeds the tolerance; the model
            is then as it was.
    """
    model = unwrapped(model)
    merging = mergeable(model, name)
    quantised, formats = dict(coded_modules(model)), formats_in(model)
    stacks = [path for path, _, _ in quantized_stacks(model)]
    check_requantize(requantize, formats)
    before = adapted(model, merging, example, prompts, tokenizer)
    merged = merged_parameters(model, merging)
    check_untied(model, {bias: (bias,) for bias in merged.new.keys() - merged.predicted.keys()})
    dtype, computed = next(iter(merged.new.values())).dtype, _computed_in(quantised)
    strict, limit = _limits(tolerance, max((dtype, computed or dtype), key=_eps), before.unrounded is not None)
    undo: list[Callable[[], None]] = []  # from before the first change on, as an interrupt may come at any line
    try:
        with using(model, None):
            _apply(model, merging, merged.new, quantised, undo)
            found = beside(model, before, tokenizer)
        found.require_within(merging, strict, limit)
    except BaseException:
        for each in undo:
            each()
        raise
    _settle(model, merging)
    notes = of_little_effect(found.exact, before.effect, dtype)
    if before.unrounded is not None:
        notes.append(f"it no longer rounds activations to 8 bits; all but that rounding differs by {found.exact:.1e}")
    if requantize is not None:
        quantize(model, requantize, only={*quantised, *stacks}, compute_dtype=computed or torch.bfloat16)
        found = beside(model, before, tokenizer)
        notes = [f"put back into {requantize} as asked: that rounding is the error above"]
    elif formats:
        forget_quantizer(model)
    return found.certificate(merging, before, merged.predicted, _path(formats, dtype), limit, notes)


def _settle(model: nn.Module, merging: Merging) -> None:
    """Takes the adapters off, all of them: one that stayed would act twice."""
    try:
        detach(model)
    except KeyboardInterrupt:
        detach(model)
        raise
    settle_stacks(model)
    if merging.bearer.labels:
        set_labels(model, merging.bearer.labels)  # the head that they belong to is the model's own now


def _path(formats: Sequence[str], dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"dequantised from {' and '.join(formats)} to {name}, then merged" if formats else f"in place in {name}"


def _limits(tolerance: float | None, coarsest: torch.dtype, rounded: bool) -> tuple[float, float]:
    """How far outputs may be off but for the rounding of activations, and with it."""
    if tolerance is not None:
        return tolerance, tolerance
    strict = usual_limit(coarsest)
    return strict, max(strict, ROUNDED_ACTIVATIONS) if rounded else strict


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _computed_in(quantised: Mapping[str, nn.Module]) -> torch.dtype | None:
    """What the products with the 4-bit weights are computed in; None for those in 8 bits, which follow their input."""
    four = [module for module in quantised.values() if hasattr(module, "compute_dtype")]
    found = (module.compute_dtype for module in four)
    return next((dtype for dtype in found if isinstance(dtype, torch.dtype)), torch.bfloat16 if four else None)


def _apply(
    model: nn.Module,
    merging: Merging,
    new: Mapping[str, Tensor],
    quantised: Mapping[str, nn.Module],
    undoing: list[Callable[[], None]],
) -> None:
    """Puts the merged weights in place; what puts the old ones back is in `undoing` before anything changes."""
    old_modules, dtype = dict(quantised), dense_dtype(model)
    old_data: list[tuple[nn.Parameter, Tensor]] = []
    head = merging.bearer.head
    trained = tensors_of(model, merging.bearer.name) if head else {}

    stacks = {path for path, _, _ in quantized_stacks(model)}
    undo_stacks: list[Callable[[], None]] = []
    layers: list[nn.Module] = []  # of heads, which may have another number of outputs than the base's

    def undo() -> None:
        for undo_stack in undo_stacks:
            undo_stack()
        for path, module in old_modules.items():
            replace_module(model, path, module)
        for parameter, data in old_data:
            parameter.data = data
        count_outputs(layers)

    def put(parameter: nn.Parameter, data: Tensor) -> None:
        old_data.append((parameter, parameter.data))
        parameter.data = data

    undoing.append(undo)
    for path, module in old_modules.items():
        merged = new.get(f"{path}.weight"), new.get(f"{path}.bias")
        replace_module(model, path, dense_module(module, *merged, dtype))
    undo_stacks.append(restore_stacks(model, new, dtype))
    for path, weight in new.items():
        owner, _, name = path.rpartition(".")
        if owner not in old_modules and path not in stacks:
            # not get_parameter: while an adapter acts, a fused weight's attribute is the adapted weight
            parameter = model.get_submodule(owner)._parameters[name]
            assert parameter is not None
            put(parameter, weight)
    for key, tensor in trained.items():
        path, _, name = key.rpartition(":head.")
        if path in head:
            parameter = model.get_submodule(path).get_parameter(name)
            put(parameter, tensor.detach().to(parameter.dtype))
            layers.append(model.get_submodule(path).get_submodule(name.rpartition(".")[0]))
    count_outputs(layers)


def count_outputs(layers: list[nn.Module]) -> None:
    """Linear layers say how many outputs their weight has."""
    for layer in layers:
        if base_class(layer) is nn.Linear and isinstance(layer, nn.Linear):
            layer.out_features = layer.weight.shape[0]
