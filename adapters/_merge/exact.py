"""What an adapter makes of the base's weights and biases, rounded to what the base stores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from adapters._attach import Adapter, Tokens, base_parameters, base_weight, table_of, tensors_of
from adapters._attach.weights import by_site
from adapters._contract import Tensors, WeightMethod, WeightSite
from adapters._errors import AdapterError
from adapters._finite import finite
from adapters._fourbit import is_quantized
from adapters._merge.certificate import relative


@dataclass
class Merged:
    """New parameters by path, as the base stores them, and the relative rounding error of each weight."""

    new: dict[str, Tensor] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def merged_parameters(model: nn.Module, adapter: Adapter) -> Merged:
    """The weights, and where the method changes them the biases, of all of an adapter's sites.

    Raises:
        AdapterError: a merged value is infinite in the base's dtype, or a layer has no bias to merge one into.
    """
    held = by_site(tensors_of(model, adapter.name))
    found, dequantised = Merged(), dense_dtype(model)
    for site in adapter.sites:
        assert isinstance(site, WeightSite)
        found.new[site.path], found.predicted[site.path] = merged_weight(
            model, adapter, site, held[site.path], dequantised
        )
        found.new.update(merged_bias(model, adapter, site, held[site.path]))
    for table in adapter.tokens.tables if adapter.tokens is not None else ():
        _merge_rows(model, adapter, table, found)
    return found


@torch.no_grad()
def merged_weight(
    model: nn.Module, adapter: Adapter, site: WeightSite, p: Tensors, dequantised: torch.dtype
) -> tuple[Tensor, float]:
    """The weight of one site as the base stores it, and its relative rounding error.

    Args:
        dequantised: what a weight in 4 bits becomes.
    """
    method, w = cast(WeightMethod, adapter.method.at(site)), base_weight(model, site)
    dense = w.dense()
    exact = method.changed(dense.float(), _wide(p))
    stored = exact.to(dequantised if is_quantized(w.stored) else dense.dtype)
    _require_finite(adapter, site.path, stored)
    return w.as_stored(stored).contiguous(), 0.0 if stored is exact else relative(stored, exact)


def _wide(p: Tensors) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in p.items()}


def _merge_rows(model: nn.Module, adapter: Adapter, path: str, found: Merged) -> None:
    """The table with the trained rows; where the method changes it as well, both changes are added."""
    table, tokens = cast(Tensor, table_of(model, path)), cast(Tokens, adapter.tokens)
    rows = tensors_of(model, adapter.name)[tokens.key(path)].float()
    ids = torch.tensor(tokens.ids, device=table.device)
    merged = found.new.get(path)
    exact = rows if merged is None else merged[ids].float() + rows - table[ids].float()
    stored = exact.to(table.dtype)
    _require_finite(adapter, path, stored)
    found.new[path] = (table if merged is None else merged).index_copy(0, ids, stored)
    rounding = 0.0 if stored is exact else relative(stored, exact)
    found.predicted[path] = max(rounding, found.predicted.get(path, 0.0))


@torch.no_grad()
def merged_bias(model: nn.Module, adapter: Adapter, site: WeightSite, p: Tensors) -> dict[str, Tensor]:
    """The bias of one site by its path, where the method changes it."""
    if site.access != "call":
        return {}
    method, w = cast(WeightMethod, adapter.method.at(site)), base_weight(model, site)
    b = w.bias()
    wide = None if b is None else b.float()
    offset = method.offset(wide, _wide(p))
    if offset is wide or offset is None:
        return {}
    if b is None:
        raise AdapterError(
            f"{adapter.name!r} trains a bias at {site.owner}, which has none, so it cannot be merged: keep it attached."
        )
    rest = sum((other.float() for other in w.biases()[1:]), start=torch.zeros_like(offset))
    path, stored = f"{site.owner}.{w.added[0]}", (offset - rest).to(b.dtype)
    _require_finite(adapter, path, stored)
    return {path: stored}


def _require_finite(adapter: Adapter, path: str, stored: Tensor) -> None:
    if not finite(stored):
        dtype = str(stored.dtype).removeprefix("torch.")
        raise AdapterError(f"merging {adapter.name!r} makes {path} infinite in {dtype}.")


def dense_dtype(model: nn.Module) -> torch.dtype:
    """What a dequantised layer is stored in: the dtype of the parameters around it, most of them."""
    counts = Counter(p.dtype for p in base_parameters(model).values() if not is_quantized(p) and p.is_floating_point())
    return counts.most_common(1)[0][0] if counts else torch.bfloat16
