"""A LoRA out of a fine-tuned model: the best approximation of what each weight moved, and what that leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from adapters._algebra.combining import put
from adapters._algebra.moved import Tuned, moved_elsewhere
from adapters._algebra.patterns import as_lora
from adapters._algebra.reports import Approximation, ExtractReport
from adapters._algebra.thin import leading, wide
from adapters._algebra.weighted import approximation, rounded
from adapters._attach import base_weight, state_of, unwrapped, using
from adapters._attach.install import check_attachable
from adapters._contract import Factors, WeightSite, require
from adapters._errors import AdapterError
from adapters._fourbit import is_quantized
from adapters._sites import SiteMap, Targets, select
from adapters._sites import sites as trace
from adapters._store.bundle import Bundle
from adapters.methods.lora import LoRA


def extract(
    model: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    name: str = "extracted",
    rank: int = 16,
    targets: Targets = None,
    *,
    sites: SiteMap | None = None,
    activate: bool = True,
    trainable: bool = False,
) -> ExtractReport:
    """Attaches to `model` what makes it, as nearly as a LoRA of this rank can, the fine-tuned model.

    Every site keeps the best approximation of W_tuned - W, computed in fp64; of a base in 4 bits the rounding is a part
    of that change. Biases come along where every site that is called has one and any of them moved. What no LoRA covers
    (norms, tables, heads) stays the base's, and is listed.

    Args:
        model: the base; adapters attached to it do not count.
        tuned: a model of the same class and shapes, or its state dict.
        name, activate, trainable: of the new adapter.
        rank: at each site, at most.
        targets, sites: as `attach`'s; without targets every default site. Sites that did not move are left out.

    Raises:
        AdapterError: the models differ in class or shapes, a weight is missing, or nothing moved.
    """
    require(isinstance(rank, int) and rank >= 1, f"rank is {rank!r}; it must be a whole number, at least 1.")
    check_attachable(model, name)
    model, given = unwrapped(model), Tuned.of(model, tuned)
    chosen = cast(tuple[WeightSite, ...], select(sites or _map(model), LoRA(rank=rank), targets))
    changes: dict[str, Factors] = {}
    found: list[Approximation] = []
    biased = _biases_moved(model, given, chosen)
    for site in chosen:
        low, about = _at(model, given, site, rank, biased)
        if about.size or low.bias is not None:
            changes[site.path] = low
            found.append(about)
    if not any(site.size for site in found):
        raise AdapterError("the weights of the fine-tuned model are those of this base: there is nothing to extract.")
    acting = tuple(site for site in chosen if site.path in changes)
    method, tensors = as_lora(acting, changes, torch.float32)
    put(model, Bundle(name, method, acting, tensors, facts={"extracted": {"rank": rank}}), activate, trainable)
    covered = {site.path for site in acting}
    covered |= {path for site in acting if biased for path in _bias_paths(model, site)}
    left, notes = moved_elsewhere(model, given, covered)
    notes += _packed(model, acting)
    return ExtractReport(name, rank, tuple(found), left, sum(t.numel() for t in tensors.values()), notes)


def _packed(model: nn.Module, acting: tuple[WeightSite, ...]) -> tuple[str, ...]:
    held = [site.path for site in acting if is_quantized(base_weight(model, site).stored)]
    return (f"{len(held)} weights are in 4 bits here, and their rounding is a part of the change",) if held else ()


def _map(model: nn.Module) -> SiteMap:
    state = state_of(model)
    if state is not None and state.map is not None:
        return state.map
    with using(model, None):
        return trace(model)


def _at(model: nn.Module, tuned: Tuned, site: WeightSite, rank: int, biased: bool) -> tuple[Factors, Approximation]:
    here = wide(base_weight(model, site).dense())
    change = tuned.weight(site).to(here.device) - here
    low = leading(change, rank)
    if biased and site.access == "call":
        biases = [tuned.tensor(path).to(here.device) - wide(tuned.base[path]) for path in _bias_paths(model, site)]
        low = replace(low, bias=torch.stack(biases).sum(0))
    stored = rounded(low, torch.float32)
    return stored, approximation(site, change, stored)


def _biases_moved(model: nn.Module, tuned: Tuned, sites: tuple[WeightSite, ...]) -> bool:
    """Whether LoRA's bias can hold what the biases moved: it would give one to layers that have none."""
    called = [site for site in sites if site.access == "call"]
    if not called or not all(_bias_paths(model, site) for site in called):
        return False
    return any(tuned.apart(path) for site in called for path in _bias_paths(model, site))


def _bias_paths(model: nn.Module, site: WeightSite) -> list[str]:
    return [f"{site.owner}.{name}" for name in base_weight(model, site).added]
