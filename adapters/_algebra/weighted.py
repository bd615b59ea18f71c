"""The weighted sum of changes of weights, site by site, as a LoRA, with the error of each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from adapters._algebra.operands import Operand, dense_change, low_rank
from adapters._algebra.patterns import as_lora
from adapters._algebra.reports import Approximation
from adapters._algebra.thin import error, leading, norm, summed, wide
from adapters._algebra.ways import Way, linear, of_elements
from adapters._contract import Factors, Method, WeightSite
from adapters._errors import AdapterError

Terms: TypeAlias = Sequence[tuple[float, Operand]]


@dataclass(frozen=True)
class Made:
    """What came out: tensors by key, and, where changes of weights were compared, each site's error."""

    method: Method
    tensors: dict[str, Tensor]
    sites: tuple[Approximation, ...] = ()
    notes: tuple[str, ...] = ()


def of_weights(terms: Terms, way: Way, sites: Sequence[WeightSite]) -> Made:
    """The combination of adapters that change weights."""
    dtype, most = stored_as(terms), _largest_rank(terms, way)
    changes: dict[str, Factors] = {}
    found = []
    for site in sites:
        here = [(weight, operand) for weight, operand in terms if site.path in operand.sites]
        low, exact = _at(site, here, way, most)
        changes[site.path] = rounded(low, dtype)
        found.append(approximation(site, exact, changes[site.path]))
    method, tensors = as_lora(sites, changes, dtype)
    return Made(method, tensors, tuple(found), _notes(sites, changes))


def rounded(low: Factors, dtype: torch.dtype) -> Factors:
    """As it will be stored."""
    bias = None if low.bias is None else low.bias.to(dtype)
    return Factors(low.left.to(dtype), low.right.to(dtype), low.scale, bias)


def approximation(site: WeightSite, exact: Factors | Tensor, stored: Factors) -> Approximation:
    """What the report says of a site."""
    rank = stored.left.shape[-1]
    return Approximation(site.path, site.role, site.block, rank, norm(exact), error(exact, stored))


def stored_as(terms: Terms) -> torch.dtype:
    """At least fp32: weights and scales are folded into what is stored."""
    held = {tensor.dtype for _, operand in terms for tensor in operand.bundle.tensors.values()}
    return torch.float64 if torch.float64 in held else torch.float32


def _at(site: WeightSite, here: Terms, way: Way, most: int) -> tuple[Factors, Factors | Tensor]:
    """What to store of one site, and what was wanted there."""
    thin = [(weight, low_rank(operand, site.path)) for weight, operand in here]
    lows = [(weight, low) for weight, low in thin if low is not None]
    if len(lows) == len(thin) and way.how in ("cat", "linear", "svd"):
        exact = summed(lows)
        if way.how == "svd":
            return leading(exact, most), exact
        return (exact if way.how == "cat" else linear(lows, site.path)), exact
    changes = [
        wide(low.dense()) if low is not None else dense_change(operand, site.path)
        for (_, low), (_, operand) in zip(thin, here, strict=True)
    ]
    whole = _dense(way, site.path, [weight for weight, _ in here], changes)
    found = leading(whole, most)
    biases = [(weight, low.scale * wide(low.bias)) for weight, low in lows if low.bias is not None]
    if biases:
        bias = _dense(way, f"{site.path} bias", [weight for weight, _ in biases], [bias for _, bias in biases])
        found = replace(found, bias=bias)
    return found, whole


def _dense(way: Way, path: str, weights: Sequence[float], changes: Sequence[Tensor]) -> Tensor:
    if way.how != "svd":
        return of_elements(way, path, weights, changes)
    return torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)]).sum(0)


def _largest_rank(terms: Terms, way: Way) -> int:
    """The rank asked for, or the largest that goes in."""
    if way.rank is not None or way.how in ("cat", "linear"):
        return way.rank or 0
    lows = [low_rank(operand, path) for _, operand in terms for path in operand.sites]
    ranks = [low.left.shape[-1] for low in lows if low is not None]
    if not ranks:
        raise AdapterError(f"how={way.how!r} needs rank=, as none of these adapters has one.")
    return max(ranks)


def _notes(sites: Sequence[WeightSite], changes: Mapping[str, Factors]) -> tuple[str, ...]:
    without = [site.path for site in sites if site.access == "call" and changes[site.path].bias is None]
    if not without or all(low.bias is None for low in changes.values()):
        return ()
    return (f"{len(without)} sites get a bias of zeros beside those that were trained, such as {without[0]}",)
