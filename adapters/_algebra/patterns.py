"""A LoRA whose rank and scale may differ from site to site, out of low-rank changes that were computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from adapters._contract import Factors, WeightSite
from adapters._errors import AdapterError
from adapters._patterns import value_at
from adapters.methods.lora import LoRA, is_read

V = TypeVar("V", int, float)


def as_lora(
    sites: Sequence[WeightSite], changes: Mapping[str, Factors], dtype: torch.dtype, dropout: float = 0.0
) -> tuple[LoRA, dict[str, Tensor]]:
    """The method and the tensors that make `changes`, by path: alpha = scale * rank, so that s is each one's scale.

    Where one of them has a bias, all sites whose layer is called get one, of zeros where there was none.
    """
    ranks = {path: low.left.shape[-1] for path, low in changes.items()}
    rank, rank_pattern = patterns(sites, ranks)
    alphas = {path: low.scale * ranks[path] for path, low in changes.items()}
    alpha, alpha_pattern = patterns(sites, alphas)
    biased = any(low.bias is not None for low in changes.values())
    tensors: dict[str, Tensor] = {}
    for site in sites:
        low = changes[site.path]
        tensors |= {f"{site.path}:a": _stored(low.right, dtype), f"{site.path}:b": _stored(low.left, dtype)}
        if biased and not is_read(site):
            bias = low.bias if low.bias is not None else low.left.new_zeros(site.n_out)
            tensors[f"{site.path}:bias"] = _stored(bias, dtype)
    method = LoRA(
        rank=rank, alpha=alpha, dropout=dropout, bias=biased, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    return method, tensors


def patterns(sites: Sequence[WeightSite], values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The value of most sites, and those of the others by role where all of a role agree, else by path."""
    usual: V = Counter(values.values()).most_common(1)[0][0]
    roles: dict[str, set[V]] = {}
    for site in sites:
        roles.setdefault(site.role, set()).add(values[site.path])
    alike = {role: next(iter(held)) for role, held in roles.items() if len(held) == 1}
    # a path also means those that end with it, so the longer one is asked first
    by_path = {site.path: values[site.path] for site in sorted(sites, key=lambda site: -len(site.path))}
    of_role = {site.path: site.role for site in sites}
    short = {path: value for path, value in by_path.items() if value != usual and of_role[path] not in alike}
    short |= {role: value for role, value in alike.items() if value != usual}
    for found in (short, by_path):
        if all(value_at(found, site, usual) == values[site.path] for site in sites):
            return usual, found
    raise AdapterError("the paths of these sites cannot be told apart, so one LoRA cannot hold a rank for each.")


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous().clone()
