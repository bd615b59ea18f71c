"""The same adapter at another rank: up exactly, down by the best approximation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from adapters._algebra.combining import put
from adapters._algebra.operands import Operand, attached, is_low_rank, low_rank
from adapters._algebra.patterns import as_lora
from adapters._algebra.reports import ResizeReport
from adapters._algebra.thin import leading, widened
from adapters._algebra.weighted import approximation, rounded, stored_as
from adapters._attach import replace as replace_attached
from adapters._attach.install import check_attachable
from adapters._contract import Factors, WeightSite, require
from adapters._errors import AdapterError


def resize(
    model: nn.Module,
    name: str,
    rank: int,
    new_name: str | None = None,
    *,
    activate: bool = True,
    trainable: bool = False,
) -> ResizeReport:
    """Gives a low-rank adapter another rank, the same at all of its sites.

    Up, the function stays: A gets further rows as a fresh LoRA has them, and B columns of zeros, which training then
    moves (at a table it is A that gets zeros). Down, every site keeps the best approximation of its change.

    Args:
        rank: of the result.
        new_name: what to call the result, which is attached beside the other; None puts it in the other's place, with
            new parameters, which an optimizer under way does not know.
        activate, trainable: of the new adapter; one that takes the other's place keeps what that had.

    Raises:
        AdapterError: an unknown name, a name that is taken, or an adapter whose change is not of low rank.
    """
    require(isinstance(rank, int) and rank >= 1, f"rank is {rank!r}; it must be a whole number, at least 1.")
    operand = attached(model, name)
    if not is_low_rank(operand):
        raise AdapterError(f"{name!r} is a {operand.method.name}, which has no rank: nothing was changed.")
    if new_name is not None:
        check_attachable(model, new_name)
    sites = cast(Sequence[WeightSite], operand.bundle.sites)
    dtype = stored_as([(1.0, operand)])
    before, after = _factors(operand, sites), {}
    for site in sites:
        low = before[site.path]
        more = low.left.shape[-1] <= rank
        after[site.path] = rounded(_padded(low, rank, site) if more else leading(low, rank), dtype)
    method, tensors = as_lora(sites, after, dtype, getattr(operand.method, "dropout", 0.0))
    found = tuple(approximation(site, widened(before[site.path]), after[site.path]) for site in sites)
    tensors |= operand.replaced
    label = new_name if new_name is not None else name
    bundle = replace(operand.bundle, name=label, method=method, tensors=tensors)
    if new_name is not None:
        put(model, bundle, activate, trainable)
    else:
        kept = {"head": bundle.head, "facts": bundle.facts, "labels": bundle.labels, "tokens": bundle.tokens}
        replace_attached(model, name, method, bundle.sites, tensors, **kept)  # type: ignore[arg-type]
    ranks = tuple(sorted({low.left.shape[-1] for low in before.values()}))
    return ResizeReport(label, rank, ranks, found, sum(tensor.numel() for tensor in tensors.values()))


def _factors(operand: Operand, sites: Sequence[WeightSite]) -> dict[str, Factors]:
    found = {site.path: low_rank(operand, site.path) for site in sites}
    return {path: low for path, low in found.items() if low is not None}


def _padded(low: Factors, rank: int, site: WeightSite) -> Factors:
    """Further rows and columns whose product is nothing. Drawn from the path, so that the same call gives the same."""
    left, right = low.left.detach(), low.right.detach()
    extra = rank - left.shape[-1]
    columns, rows = left.new_zeros(*left.shape[:-1], extra), right.new_zeros(*right.shape[:-2], extra, site.n_in)
    drawn = hashlib.sha256(site.path.encode()).digest()[:7]
    generator = torch.Generator().manual_seed(int.from_bytes(drawn, "big"))
    part, bound = (columns, rank**-0.5) if site.role == "embedding" else (rows, site.n_in**-0.5)
    part.copy_((2 * torch.rand(part.shape, generator=generator) - 1) * bound)
    return replace(low, left=torch.cat([left, columns], -1), right=torch.cat([right, rows], -2))
