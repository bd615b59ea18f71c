"""LoRA at parameters that are read, fused experts above all: PEFT's `target_parameters` (lora/layer.py, ParamWrapper).

PEFT keeps the experts of a parameter (experts, d1, d2) side by side, A (experts * rank, d) and B (d', rank * experts),
and computes, by expert, B A (d1, d2), or (B A)^T where it takes the parameter for one of (n_in, n_out). Of several
parameters of one module each wraps those before it, which is where `base_layer` in the names comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adapters._contract import WeightSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.files import Stored
from adapters._interop.folder import CONFIG, PREFIX
from adapters._interop.layers import PARTS, Layer
from adapters._interop.targets import suffix_of

WRAPPED = ".base_layer"
ASSUMED = "the file does not say which PEFT wrote it, nor does the square {}: read as those before 0.19 kept it."
AS_TODAY = (0, 19)  # before this version PEFT took every stack for one of (n_in, n_out)


def file_keys(sites: Sequence[WeightSite], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """What the names of each site's tensors begin with: the module's path, wrapped as often as PEFT wraps it."""
    found: dict[str, str] = {}
    for owner in dict.fromkeys(site.owner for site in sites):
        held = {site.parameter: site for site in sites if site.owner == owner}
        inside_out = [held[name] for name in modules[owner]._parameters if name in held]
        found |= {site.path: owner + WRAPPED * i for i, site in enumerate(reversed(inside_out))}
    return found


def parameters_of(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths of the base's own parameters, of all modules but the root's."""
    return {f"{path}.{name}" for path, module in modules.items() for name in module._parameters}


def stored(site: WeightSite, rank: int, module: nn.Module) -> dict[str, tuple[str, Stored]]:
    """For our "a" and "b": PEFT's "a" or "b", and how it is kept there."""
    all_ranks = (site.experts or 1) * rank
    if _crossed(site, _swaps(site, module)):  # (B A)^T = A^T B^T: the two change places
        return {
            "b": ("a", Stored((0, 2, 1), (all_ranks, site.n_out))),
            "a": ("b", Stored((2, 1, 0), (site.n_in, all_ranks))),
        }
    return {
        "a": ("a", Stored((0, 1, 2), (all_ranks, site.n_in))),
        "b": ("b", Stored((1, 2, 0), (site.n_out, all_ranks))),
    }


def take_parameters(
    config: Mapping[str, Any], tensors: dict[str, Tensor], layers: Mapping[str, Layer], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """Takes the tensors of `target_parameters` out of a file's: ours, by the path of each parameter, and what to say.

    Raises:
        AdapterError: a name means no parameter that is adapted here, or tensors of other shapes are there.
        DamagedAdapter: tensors of a parameter that is named are missing.
    """
    named = [str(each) for each in config.get("target_parameters") or []]
    places = {place: layer.site for place, layer in layers.items() if layer.kind == "parameter"}
    sites = [site for site in places.values() if any(suffix_of(name, site.path) for name in named)]
    for name in named:
        if not any(suffix_of(name, site.path) for site in sites):
            raise AdapterError(f"{CONFIG} names the parameter {name}, which is none that is read in this model.")
    version, found = str(config.get("peft_version") or ""), {}
    for path, key in file_keys(sites, modules).items():
        parts = [f"{PREFIX}{key}.{PARTS['parameter'][name]}" for name in "ab"]
        missing = [part for part in parts if part not in tensors]
        if missing:
            raise DamagedAdapter(f"the file lacks {missing[0]}, a tensor of {path}, which {CONFIG} names.")
        site, (a, b) = places[path], (tensors.pop(part) for part in parts)
        ours = _from_stored(site, a, b, modules[site.owner], version)
        if ours is None:
            raise AdapterError(
                f"the adapter's A and B at {path} are {list(a.shape)} and {list(b.shape)}, which do not fit the "
                f"parameter here: {site.experts or 1} matrices of {site.n_out} x {site.n_in}."
            )
        found[path] = ours
    square = [path for path in found if places[path].experts is not None and places[path].n_in == places[path].n_out]
    return found, (ASSUMED.format(square[0]),) if square and _version(version) == (0, 0) else ()


def _from_stored(site: WeightSite, a: Tensor, b: Tensor, module: nn.Module, version: str) -> dict[str, Tensor] | None:
    """Our tensors from PEFT's A and B; None where they do not fit the parameter.

    Args:
        version: the PEFT that wrote them, "" where it did not say (before 0.18).
    """
    count = site.experts or 1
    d1, d2 = (site.n_in, site.n_out) if site.transposed else (site.n_out, site.n_in)
    rank = a.shape[0] // count if a.dim() == 2 else 0
    if rank < 1 or a.shape[0] != rank * count or b.dim() != 2 or b.shape[1] != rank * count:
        return None
    if d1 != d2:
        swaps = a.shape[1] == d2
    else:
        swaps = _swaps(site, module) if site.experts is None or _version(version) >= AS_TODAY else False
    if (a.shape[1], b.shape[0]) != ((d2, d1) if swaps else (d1, d2)):
        return None
    by_a = a.reshape(count, rank, a.shape[1])
    by_b = b.reshape(b.shape[0], rank, count).permute(2, 0, 1)
    ours = {"a": by_b.mT, "b": by_a.mT} if _crossed(site, swaps) else {"a": by_a, "b": by_b}
    lead = slice(None) if site.experts is not None else 0
    return {name: tensor[lead].contiguous() for name, tensor in ours.items()}


def _swaps(site: WeightSite, module: nn.Module) -> bool:
    """Whether today's PEFT takes the parameter for one of (n_out, n_in)."""
    return site.experts is None or not getattr(module, "is_transposed", False)


def _crossed(site: WeightSite, swaps: bool) -> bool:
    """Whether PEFT's and our idea of what is an input differ."""
    return swaps == site.transposed


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2]) or (0, 0)
