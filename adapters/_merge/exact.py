"""What an adapter makes of the base's weights and biases, rounded to what the base stores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from adapters._attach import Tokens, base_parameters, base_weight, table_of, tensors_of
from adapters._coded import is_coded
from adapters._contract import Tensors, WeightMethod, WeightSite
from adapters._errors import AdapterError
from adapters._finite import finite
from adapters._merge.allowed import Merging
from adapters._merge.certificate import relative
from adapters._selection import Average, Part, Stack


@dataclass
class Merged:
    """New parameters by path, as the base stores them, and the relative rounding error of each weight."""

    new: dict[str, Tensor] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def merged_parameters(model: nn.Module, merging: Merging) -> Merged:
    """The weights, and where a method changes them the biases, of all sites.

    Raises:
        AdapterError: a merged value is infinite in the base's dtype, or a layer has no bias to merge one into.
    """
    found, dequantised = Merged(), dense_dtype(model)
    for site in merging.sites:
        found.new[site.path], found.predicted[site.path] = merged_weight(model, merging, site, dequantised)
        found.new.update(merged_bias(model, merging, site))
    for table in merging.tokens.tables if merging.tokens is not None else ():
        merge_rows(model, merging, table, found)
    return found


@torch.no_grad()
def merged_weight(
    model: nn.Module, merging: Merging, site: WeightSite, dequantised: torch.dtype
) -> tuple[Tensor, float]:
    """The weight of one site as the base stores it, and its relative rounding error.

    Args:
        dequantised: what a weight in 4 or 8 bits becomes.
    """
    w = base_weight(model, site)
    dense = w.dense()
    exact = _changed(merging, merging.selection, site, dense.float())
    stored = exact.to(dequantised if is_coded(w.stored) else dense.dtype)
    _require_finite(merging, site.path, stored)
    return w.as_stored(stored).contiguous(), 0.0 if stored is exact else relative(stored, exact)


def _changed(merging: Merging, part: Part, site: WeightSite, w: Tensor) -> Tensor:
    """What a part of a selection makes of a weight: `adapters.Stack` and `adapters.Average` say how."""
    match part:
        case None:
            return w
        case str():
            p = merging.tensors[part].get(site.path)
            return w if p is None else _method(merging, part, site).changed(w, _wide(p))
        case Stack():
            for each in part.parts:
                w = _changed(merging, each, site, w)
            return w
        case Average():
            pairs = zip(part.weights, part.parts, strict=True)
            return w + sum(weight * (_changed(merging, each, site, w) - w) for weight, each in pairs)
    raise AdapterError(f"{part!r} is no change of weights.")


def _offset(merging: Merging, part: Part, site: WeightSite, b: Tensor | None) -> Tensor | None:
    """The same for the bias; `b` itself where nothing changes it."""
    match part:
        case str():
            p = merging.tensors[part].get(site.path)
            return b if p is None else _method(merging, part, site).offset(b, _wide(p))
        case Stack():
            for each in part.parts:
                b = _offset(merging, each, site, b)
            return b
        case Average():
            made = [_offset(merging, each, site, b) for each in part.parts]
            if all(each is b for each in made):
                return b
            changed = next(each for each in made if each is not None)
            start = torch.zeros_like(changed) if b is None else b
            pairs = zip(part.weights, made, strict=True)
            return start + sum(weight * (each - start) for weight, each in pairs if each is not None)
    return b


def _method(merging: Merging, name: str, site: WeightSite) -> WeightMethod:
    return cast(WeightMethod, merging.adapters[name].method.at(site))


def _wide(p: Tensors) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in p.items()}


def merge_rows(model: nn.Module, merging: Merging, path: str, found: Merged) -> None:
    """The table with the trained rows; where the method changes it as well, both changes are added."""
    table, tokens = cast(Tensor, table_of(model, path)), cast(Tokens, merging.tokens)
    rows = tensors_of(model, merging.bearer.name)[tokens.key(path)].float()
    ids = torch.tensor(tokens.ids, device=table.device)
    merged = found.new.get(path)
    exact = rows if merged is None else merged[ids].float() + rows - table[ids].float()
    stored = exact.to(table.dtype)
    _require_finite(merging, path, stored)
    found.new[path] = (table if merged is None else merged).index_copy(0, ids, stored)
    rounding = 0.0 if stored is exact else relative(stored, exact)
    found.predicted[path] = max(rounding, found.predicted.get(path, 0.0))


@torch.no_grad()
def merged_bias(model: nn.Module, merging: Merging, site: WeightSite) -> dict[str, Tensor]:
    """The bias of one site by its path, where a method changes it."""
    if site.access != "call":
        return {}
    w = base_weight(model, site)
    b = w.bias()
    wide = None if b is None else b.float()
    offset = _offset(merging, merging.selection, site, wide)
    if offset is wide or offset is None:
        return {}
    if b is None:
        raise AdapterError(
            f"{merging.name!r} trains a bias at {site.owner}, which has none, so it cannot be merged: keep it attached."
        )
    rest = sum((other.float() for other in w.biases()[1:]), start=torch.zeros_like(offset))
    path, stored = f"{site.owner}.{w.added[0]}", (offset - rest).to(b.dtype)
    _require_finite(merging, path, stored)
    return {path: stored}


def _require_finite(merging: Merging, path: str, stored: Tensor) -> None:
    if not finite(stored):
        dtype = str(stored.dtype).removeprefix("torch.")
        raise AdapterError(f"merging {merging.name!r} makes {path} infinite in {dtype}.")


def dense_dtype(model: nn.Module) -> torch.dtype:
    """What a dequantised layer is stored in: the dtype of the parameters around it, most of them."""
    counts = Counter(p.dtype for p in base_parameters(model).values() if not is_coded(p) and p.is_floating_point())
    return counts.most_common(1)[0][0] if counts else torch.bfloat16
