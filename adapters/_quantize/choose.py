"""Which weights are stored in 4 bits, and why the others are not."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from adapters._contract import WeightSite
from adapters._fourbit import gives_back, is_quantized, shape_of
from adapters._heads import base_model, output_embeddings
from adapters._layers import is_conv1d
from adapters._sites import SiteMap

BLOCK = 64  # elements that share a scale


@dataclass
class Choice:
    """Paths of layers and of weights that are read to quantise; every other weight and the reason it stays."""

    layers: list[str] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def choose(model: nn.Module, sites: SiteMap | None, device: torch.device | str | None = None) -> Choice:
    """What can be quantised without changing what the model computes, but for the rounding.

    A layer whose call is known, from the map, to be a product and nothing else can; so can one of torch's own linear
    layers that the map does not know, such as those of a tower that the probe did not reach.
    """
    found, head, read = Choice(), heads(model), _read_elsewhere(model)
    known = {site.path: site for site in sites.weights} if sites is not None else {}
    others = {each.path: each.reason for each in sites.others} if sites is not None else {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            at = f"{path}.{name}" if path else name
            if parameter is None or is_quantized(parameter) or len(shape_of(parameter)) < 2:
                continue
            if isinstance(module, nn.Embedding):
                continue
            site = known.get(at)
            reason = others.get(at) or _reason(module, path, parameter, site, head) or read.get(path, "")
            reason = reason or _given_back(module, parameter, device)
            if reason:
                found.left[at] = reason
            elif site is not None and site.access == "read":
                found.stacks.append(at)
            else:
                found.layers.append(path)
    return found


def heads(model: nn.Module) -> set[str]:
    """Modules after the base model: the output embeddings and task heads, whose 4-bit noise would reach every logit."""
    inside, output = set((base_model(model) or model).modules()), output_embeddings(model)
    return {path for path, module in model.named_modules() if module not in inside or module is output}


def _reason(module: nn.Module, path: str, parameter: nn.Parameter, site: WeightSite | None, head: set[str]) -> str:
    if path in head or (site is not None and site.role in ("head", "embedding-tied")):
        return "output head"
    if site is not None and site.role == "router":
        return "chooses experts, which its rounding would change"
    stack = site is not None and site.experts is not None
    plain = site is not None and site.access == "call"
    if not stack and not plain and not is_linear(module):
        return f"read by a {type(module).__name__} as it is stored, and no stack of matrices"
    if not parameter.is_floating_point():
        return f"stored as {parameter.dtype}"
    size = parameter[0].numel() if stack else parameter.numel()
    return f"its size is no multiple of {BLOCK}" if size % BLOCK else ""


def _given_back(module: nn.Module, parameter: nn.Parameter, device: torch.device | str | None) -> str:
    width = parameter.shape[0] if is_conv1d(module) else parameter.shape[-1]
    target = torch.device(device) if device is not None else parameter.device
    if target.type == "meta" or gives_back(width, parameter.dtype, target):
        return ""
    return f"bitsandbytes does not give back rows of {width} rightly on this {target.type}"


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


def is_linear(module: nn.Module) -> bool:
    """Whether a module's class is one whose forward is a product and nothing else, whatever model it is in."""
    # a subclass that overrides `forward` may do more than a product, and would lose it in the exchange
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or is_conv1d(module)
