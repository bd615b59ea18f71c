"""How far training moved each site: what a change of a weight amounts to, or how far tensors are from their start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters._attach import base_weight, unwrapped
from adapters._contract import Factors, WeightMethod, WeightSite
from adapters.train.preflight.places import Place, acting, named, places


@dataclass(frozen=True)
class Change:
    """Frobenius norms at one site: `moved` of the change, `size` of what was changed."""

    path: str
    block: str
    role: str
    moved: float
    size: float

    @property
    def relative(self) -> float:
        return self.moved / self.size if self.size else math.nan


def start_of(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Copies of the tensors that say nothing of a change by themselves; to be taken before training.

    Of adapters that change weights there is nothing to keep: their change is what they now do to the weight.
    """
    return {
        f"{place.path}:{key}": tensor.detach().cpu().clone()
        for place in _chosen(model, name)
        if not _changes_a_weight(place)
        for key, tensor in place.tensors.items()
    }


def weight_changes(
    model: nn.Module, before: Mapping[str, Tensor] | None = None, name: str | None = None
) -> tuple[Change, ...]:
    """The change at every site, in order of the sites.

    Args:
        before: from `start_of`; without it, the change is NaN where the adapter does not change a weight.
        name: the adapter; None takes those that act.
    """
    found = []
    for place in _chosen(model, name):
        norms = _of_weight(unwrapped(model), place) if _changes_a_weight(place) else _of_tensors(place, before or {})
        block, role = (place.site.block, place.site.role) if place.site is not None else ("", "head")
        found.append(Change(place.path, block, role, *norms))
    return tuple(found)


def by_layer(changes: Sequence[Change]) -> tuple[list[str], list[str], list[list[float]]]:
    """Roles, layers, and `[role][layer]` relative changes, sites of one role in one layer taken together; else NaN."""
    roles = list(dict.fromkeys(change.role for change in changes))
    blocks = list(dict.fromkeys(change.block for change in changes))
    cells: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        cells.setdefault((change.role, change.block), []).append(change)
    table = [[_together(cells.get((role, block), [])) for block in blocks] for role in roles]
    return roles, _labels(blocks), table


def _chosen(model: nn.Module, name: str | None) -> list[Place]:
    adapters = named(model, name) if name is not None else acting(model)
    return [place for adapter in adapters for place in places(model, adapter)]


def _changes_a_weight(place: Place) -> bool:
    return isinstance(place.site, WeightSite) and isinstance(place.adapter.method, WeightMethod)


def _of_weight(model: nn.Module, place: Place) -> tuple[float, float]:
    assert isinstance(place.site, WeightSite)
    assert isinstance(place.adapter.method, WeightMethod)
    method, p = place.adapter.method.at(place.site), {key: t.detach() for key, t in place.tensors.items()}
    with torch.no_grad():
        w, low = base_weight(model, place.site).dense().float(), method.factors(p)
        moved = _product_norm(low) if low is not None else float((method.changed(w, p).float() - w).norm())
        return moved, float(w.norm())


def _product_norm(low: Factors) -> float:
    """||s L R|| from two matrices of the rank's size: ||L R||^2 = tr(L'L R R')."""
    left, right = low.left.double(), low.right.double()
    squared = ((left.mT @ left) * (right @ right.mT).mT).sum()
    return abs(low.scale) * math.sqrt(max(0.0, float(squared)))


def _of_tensors(place: Place, before: Mapping[str, Tensor]) -> tuple[float, float]:
    pairs = [(tensor.detach().cpu(), before.get(f"{place.path}:{key}")) for key, tensor in place.tensors.items()]
    known = [(now.float(), start.float()) for now, start in pairs if start is not None and start.shape == now.shape]
    if len(known) < len(pairs):
        return math.nan, math.nan
    return math.hypot(*(float((now - start).norm()) for now, start in known)), math.hypot(
        *(float(start.norm()) for _, start in known)
    )


def _together(changes: Sequence[Change]) -> float:
    size = math.hypot(*(change.size for change in changes))
    return math.hypot(*(change.moved for change in changes)) / size if size else math.nan


def _labels(blocks: Sequence[str]) -> list[str]:
    """Layers by their number, with the stack's name where there are several stacks; `-` outside of all layers."""
    split = [block.rpartition(".")[::2] for block in blocks]
    stacks = [stack.split(".") for stack in dict.fromkeys(stack for stack, number in split if number.isdigit())]
    shared = set.intersection(*map(set, stacks)) if stacks else set()
    names = {".".join(stack): next((part for part in stack if part not in shared), stack[-1]) for stack in stacks}
    return [
        (number if len(stacks) < 2 else f"{names[stack]} {number}") if number.isdigit() else block or "-"
        for (stack, number), block in zip(split, blocks, strict=True)
    ]
