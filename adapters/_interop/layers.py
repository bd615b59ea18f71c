"""The kinds of layers that PEFT's LoRA knows, and its names and shapes for the tensors at each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from torch import nn

from adapters._attach.swap import base_class
from adapters._contract import WeightSite

Kind = Literal["linear", "table", "kernel", "parameter"]
LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
PARTS: dict[Kind, Mapping[str, str]] = {
    "linear": LINEAR,
    "table": {"a": "lora_embedding_A", "b": "lora_embedding_B"},
    "kernel": {"a": "lora_A.weight", "b": "lora_B.weight"},
    "parameter": {"a": "lora_A.weight", "b": "lora_B.weight"},
}


class Layer(NamedTuple):
    """A weight that PEFT's LoRA can adapt, and what PEFT takes its owner for."""

    site: WeightSite
    kind: Kind

    @property
    def place(self) -> str:
        """What PEFT knows it by: the module's path, or, where it adapts a parameter by itself, the parameter's."""
        return self.site.path if self.kind == "parameter" else self.site.owner


def layers_of(sites: Iterable[WeightSite], modules: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """The layers that PEFT's LoRA can adapt, by what it knows them by."""
    kinds = ((site, kind_of(site, modules[site.owner])) for site in sites)
    found = [Layer(site, kind) for site, kind in kinds if kind is not None]
    return {layer.place: layer for layer in found}


def kind_of(site: WeightSite, module: nn.Module) -> Kind | None:
    """What PEFT takes the owner of the weight for, where it computes there what our LoRA does."""
    # transformers' Conv1D is a linear layer with a transposed weight, and PEFT knows it by this name too
    linear = isinstance(module, nn.Linear) or base_class(module).__name__ == "Conv1D"
    if site.access == "read" and not site.folded and site.role != "embedding":
        # a linear layer's weight that is read was read by another module, whose forward PEFT does not change
        return None if linear or site.experts == 1 else "parameter"
    if site.experts is not None or site.parameter != "weight":
        return None
    if site.role == "embedding":
        return "table" if isinstance(module, nn.Embedding) else None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "kernel" if site.folded and _plain(module) else None
    return "linear" if linear and site.access == "call" else None


def _plain(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """PEFT's convolution by A has the kernel, stride and padding of the base's and nothing else (0.21)."""
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"


def stored_shape(kind: Kind, name: str, site: WeightSite, rank: int) -> tuple[int, ...] | None:
    """The shape of a tensor in PEFT's file where it is another than ours: A and B of a convolution are kernels.

    A (rank, channels, *kernel), B (n_out, rank, 1, ...).
    """
    if kind != "kernel":
        return None
    return (rank, *site.folded) if name == "a" else (site.n_out, rank, *(1 for _ in site.folded[1:]))
