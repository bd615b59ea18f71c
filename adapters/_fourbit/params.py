"""Parameters that bitsandbytes holds in 4 bits. bitsandbytes is imported only once such a parameter was met."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from adapters._errors import AdapterError

_REPACKED = (
    "{} was repacked in place by an eval forward (a bitsandbytes optimisation for this CPU that loses the original): "
    "reload the base with adapters.load_base, or attach before its first forward."
)


def is_quantized(parameter: object) -> bool:
    """Whether a parameter is a 4-bit one: it carries the state needed to read it."""
    return getattr(parameter, "quant_state", None) is not None


def dequantize(parameter: nn.Parameter) -> Tensor:
    """A 4-bit parameter as a dense tensor (n_out, n_in), in the dtype it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    state = parameter.quant_state  # type: ignore[attr-defined]
    if getattr(state, "packing_format_for_cpu", False):
        raise AdapterError(_REPACKED.format("a 4-bit weight"))
    dense: Tensor = dequantize_4bit(parameter.data, quant_state=state)
    return dense


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the weight that a parameter holds, which a 4-bit one stores packed."""
    state = getattr(parameter, "quant_state", None)
    return tuple(int(size) for size in (parameter.shape if state is None else state.shape))


def elements(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds; a 4-bit one stores two a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that own a 4-bit matrix and are called, with their paths."""
    for path, module, name in quantized_parameters(model):
        if len(shape_of(module._parameters[name])) == 2:  # type: ignore[arg-type]
            yield path.rpartition(".")[0], module


def quantized_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The 4-bit stacks of matrices, which code reads: path, owner, and name there."""
    for path, module, name in quantized_parameters(model):
        if len(shape_of(module._parameters[name])) == 3:  # type: ignore[arg-type]
            yield path, module, name


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every 4-bit parameter: its path, its owner, and its name there."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if is_quantized(parameter):
                yield (f"{path}.{name}" if path else name), module, name


def guard_against_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place.

    On CPUs with AVX512-BF16 the first forward in eval mode converts the weight to another memory layout, after which
    dequantising, merging, `state_dict()` and the gradients of a later training step read the new layout as if it were
    the old one (bitsandbytes 0.50, `Linear4bit.forward`).

    Raises:
        AdapterError: it has already happened; the conversion rounds the scales to bf16, so it cannot be undone exactly.
    """
    for path, module in quantized_modules(model):
        if getattr(module._parameters["weight"].quant_state, "packing_format_for_cpu", False):  # type: ignore[union-attr]
            raise AdapterError(_REPACKED.format(path))
    for _, module in quantized_modules(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where the module at `path` was, keeping its place among its siblings and its mode."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    new.train(parent._modules[name].training)  # type: ignore[union-attr]
    parent._modules[name] = new


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
