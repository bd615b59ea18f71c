"""What of an adapter decides with which others it can act, found once, when it is attached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters._attach.called import CalledWeight, ScaledInput
from adapters._contract import (
    FusionMethod,
    KeyValueMethod,
    KeyValueSite,
    LayerSite,
    Method,
    Site,
    StreamSite,
    WeightMethod,
    WeightSite,
)


@dataclass(frozen=True)
class Traits:
    """`unfollowed`: why the rows of a batch cannot be told apart at one of its sites. Sites by what is done there."""

    unfollowed: str = ""
    unsplit: str = ""  # why its tokens cannot
    added: frozenset[str] = frozenset()  # paths of weights to which a low-rank change is added
    scaled: frozenset[str] = frozenset()  # paths of weights whose inputs are scaled
    other: frozenset[str] = frozenset()  # paths of called weights that change in another way
    outputs: frozenset[str] = frozenset()  # of those, where all that happens is that outputs are scaled, biases too
    prefix: int = 0  # virtual tokens before the keys
    shift: int = 0  # by how many positions these move the tokens
    layers: bool = False  # virtual tokens in the layers
    stacks: bool = False  # whether it can be stacked with whatever else can: nothing of the above stands against it
    plain: bool = False  # whether it can be averaged and act on rows as well


def traits_of(
    method: Method, sites: tuple[Site, ...], entries: Iterable[object], head: bool = False, tokens: bool = False
) -> Traits:
    """The traits of an adapter from its sites and entries."""
    called: dict[str, set[str]] = {"added": set(), "scaled": set(), "other": set(), "outputs": set()}
    for entry in entries:
        if isinstance(entry, CalledWeight | ScaledInput):
            kind = "scaled" if isinstance(entry, ScaledInput) else "added" if entry.additive else "other"
            called[kind].add(entry.path)
            if isinstance(entry, CalledWeight) and not entry.additive and _scales_outputs(entry):
                called["outputs"].add(entry.path)
    follow = next(filter(None, map(_unfollowed, sites)), "")
    follow = follow or ("its rows of tokens are read, not called" if tokens else "")
    split = follow or next(filter(None, map(_unsplit, sites)), "")
    split = split or ("its head sees no tokens" if head else "it scales inputs" if called["scaled"] else "")
    length = method.length if isinstance(method, KeyValueMethod) and isinstance(sites[0], KeyValueSite) else 0
    paths = {key: frozenset(found) for key, found in called.items()}
    shift = length if isinstance(method, KeyValueMethod) and method.positions == "shifted" else 0
    layers = any(isinstance(site, LayerSite) for site in sites)
    stacks = not (paths["scaled"] or paths["other"] or layers)
    plain = stacks and not (follow or length or head or tokens or isinstance(method, FusionMethod))
    return Traits(follow, split, **paths, prefix=length, shift=shift, layers=layers, stacks=stacks, plain=plain)


def _unfollowed(site: Site) -> str:
    where = site.path
    if isinstance(site, LayerSite):
        return f"virtual tokens are inserted before {where} for the whole batch"
    if isinstance(site, KeyValueSite) and site.product is not None:
        return f"the attention {where} is written out in the model"
    if isinstance(site, WeightSite) and site.access == "read":
        return f"the weight {where} is read, not called"
    if site.rows.layout in ("none", "routed"):
        how = "tokens are picked" if site.rows.layout == "routed" else "the probe saw no rows"
        return f"{how} at {where}"
    turned = isinstance(site, StreamSite) and (site.axis != -1 or site.input_axis != -1)
    return f"features are not the last axis at {where}" if turned and str(site.rows) != "axis 0" else ""


def _unsplit(site: Site) -> str:
    if isinstance(site, KeyValueSite):
        return "every token sees a prefix"
    turned = isinstance(site, StreamSite) and site.axis != -1
    return f"features are not the last axis at {site.path}" if turned else ""


class _Unread(Exception):
    """The weight was asked for."""


class _Handle:
    """A weight that is not at hand: who needs it is no scaling of the outputs."""

    shape: tuple[int, ...] = ()

    def dense(self) -> Tensor:
        raise _Unread

    def bias(self) -> Tensor | None:
        return None


def _scales_outputs(entry: CalledWeight) -> bool:
    """Whether the change is `diag(outputs) (W x + b)`, known without a look at the weight."""
    method, p = entry.method, entry.own()
    assert isinstance(method, WeightMethod)
    try:
        scaled = method.scaled(_Handle(), p)
    except _Unread:
        return False
    if scaled is None or scaled.low is not None:
        return False
    offset = method.offset(torch.ones_like(scaled.outputs), p)
    return offset is not None and torch.equal(offset, scaled.outputs)
