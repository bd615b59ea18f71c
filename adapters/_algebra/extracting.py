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
from adapters._algebra.thin import leading
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
    activate: bool = True,
    trainable: bool = False,
) -> ExtractReport:
    """Attaches to `model` what makes it, as nearly as a LoRA of this rank can, the fine-tuned model.

    At every site W_tuned - W is replaced by its best approximation; computed in fp64, also where weights are in 4 bits:
    the rounding of a base in 4 bits is then a part of the change. Biases come along where every site that is called
    has one and any of them moved. What no LoRA covers (norms, tables, heads) stays the base's, and is listed.

    Args:
        model: the base, to which adapters may be attached; they do not count.
        tuned: a model of the same class and shapes, or its state dict.
        name: of the new adapter.
        rank: at each site, at most.
        targets: as `attach`'s; None takes every default site. Sites that did not move are left out.
        activate, trainable: of the new adapter.

    Raises:
        AdapterError: the models differ in class or shapes, a weight is missing, or nothing moved.
    """
    require(isinstance(rank, int) and rank >= 1, f"rank is {rank!r}; it must be a whole number, at least 1.")
    check_attachable(model, name)
    model, given = unwrapped(model), Tuned.of(model, tuned)
    known = _map(model)
    chosen = cast(tuple[WeightSite, ...], select(known, LoRA(rank=rank), targets))
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
    sites = tuple(site for site in chosen if site.path in changes)
    method, tensors = as_lora(sites, changes, torch.float32)
    put(model, Bundle(name, method, sites, tensors, facts={"extracted": {"rank": rank}}), activate, trainable)
    covered = {path for site in sites for path in (site.path, *site.aliases)}
    covered |= {path for site in sites if biased for path in _bias_paths(model, site)}
    left, notes = moved_elsewhere(model, given, covered)
    packed = [site.path for site in sites if is_quantized(base_weight(model, site).stored)]
    if packed:
        notes = (*notes, f"{len(packed)} weights are in 4 bits here, and their rounding is a part of the change")
    return ExtractReport(name, rank, tuple(found), left, sum(t.numel() for t in tensors.values()), notes)


def _map(model: nn.Module) -> SiteMap:
    state = state_of(model)
    if state is not None and state.map is not None:
        return state.map
    with using(model, None):
        return trace(model)


def _at(model: nn.Module, tuned: Tuned, site: WeightSite, rank: int, biased: bool) -> tuple[Factors, Approximation]:
    change = tuned.weight(site) - base_weight(model, site).dense().detach().to("cpu", torch.float64)
    low = leading(change, min(rank, site.n_in, site.n_out))
    if biased and site.access == "call":
        here = base_weight(model, site).bias()
        assert here is not None
        shift = sum((tuned.tensor(path) for path in _bias_paths(model, site)), start=-here.detach().cpu().double())
        low = replace(low, bias=shift)
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
