"""Combining adapters of one method tensor by tensor, where its mathematics gives the sum a meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from adapters._algebra.operands import Operand
from adapters._algebra.thin import wide
from adapters._attach.weights import by_site
from adapters._contract import Method, Site, StreamSite, require
from adapters._errors import AdapterError
from adapters.methods.bottleneck import Bottleneck
from adapters.methods.ia3 import IA3
from adapters.methods.prefix import Prefix

Terms: TypeAlias = Sequence[tuple[float, Operand]]
Named: TypeAlias = dict[str, Tensor]
OFF = 1e-6  # how far the weights of an average may be from a sum of 1


class Joined(NamedTuple):
    """A method, its tensors by key in fp64, and, in a clause, what they are of the adapters that went in."""

    method: Method
    tensors: Named
    meaning: str


@singledispatch
def joined(method: Method, how: str, terms: Terms, sites: Sequence[Site]) -> Joined:
    """The adapters of `terms` as one adapter of their own method.

    Raises:
        AdapterError: the mathematics of this method has no such sum, or these adapters differ in what it needs alike.
    """
    raise AdapterError(f"{method.name} has no combination {how!r}: a sum of its tensors is not a sum of what they do.")


@joined.register
def _(method: Bottleneck, how: str, terms: Terms, sites: Sequence[Site]) -> Joined:
    if how == "cat":
        return _side_by_side(method, terms, sites)
    _require_alike(how, terms, ("placement", "activation", "scale", "reduction_factor", "reads", "eps"))
    return Joined(method, _averaged(terms, "bottlenecks"), "the tensors' average, not that of what they do")


@joined.register
def _(method: Prefix, how: str, terms: Terms, sites: Sequence[Site]) -> Joined:
    require(how == "linear", "prefixes follow one another, which a Stack of them does; how='linear' averages them.")
    _require_alike(how, terms, ("length", "positions", "where"))
    alike = all(operand.method == method for _, operand in terms)
    return Joined(
        method if alike else replace(method, text=None), _averaged(terms, "prefixes"), "the average of keys and values"
    )


@joined.register
def _(method: IA3, how: str, terms: Terms, sites: Sequence[Site]) -> Joined:
    """l = 1 + sum_i w_i (l_i - 1): exactly the sum of the changes of W, whatever the weights."""
    require(how == "linear", f"IA3 has no ranks for how={how!r}; how='linear' is the exact sum of its changes.")
    found = _by_key(terms, lambda weight, tensor: weight * (wide(tensor) - 1))
    both = next((path for path, parts in by_site(found).items() if len(parts) > 1), None)
    require(both is None, f"one scales the inputs of {both} and another its outputs, which no single IA3 does.")
    inputs = {entry for _, operand in terms if isinstance(operand.method, IA3) for entry in operand.method.feedforward}
    made = replace(method, feedforward=tuple(sorted(inputs)))
    return Joined(made, {key: tensor + 1 for key, tensor in found.items()}, "the exact sum of the changes")


def _side_by_side(method: Bottleneck, terms: Terms, sites: Sequence[Site]) -> Joined:
    """[D_1; D_2] and [w_1 U_1, w_2 U_2]: one bottleneck as wide as all together does exactly the weighted sum."""
    _require_alike("cat", terms, ("placement", "activation", "reads", "eps"))
    scales = {operand.method.scale for _, operand in terms if isinstance(operand.method, Bottleneck)}
    scale = method.scale if len(scales) == 1 and method.scale else 1.0
    found: Named = {}
    for site in sites:
        assert isinstance(site, StreamSite)
        held = [_at(site, operand, weight, scale) for weight, operand in terms]
        for name, axis in (("down", 0), ("down_bias", 0), ("up", 1)):
            found[f"{site.path}:{name}"] = torch.cat([part[name] for part in held], axis)
        found[f"{site.path}:up_bias"] = torch.stack([part["up_bias"] for part in held]).sum(0)
    widths = {site.path: (site.width, found[f"{site.path}:down"].shape[0]) for site in sites}  # type: ignore[union-attr]
    factor = reduction_factor(*next(iter(widths.values())))
    return Joined(replace(method, scale=scale, reduction_factor=factor), found, "the exact sum of what they do")


def reduction_factor(width: int, inner: int) -> float:
    """With which a stream of `width` gets a bottleneck of `inner` units, in spite of rounding."""
    return next(factor for factor in (width / inner, width / (inner + 0.5)) if int(width / factor) == inner)


def _at(site: StreamSite, operand: Operand, weight: float, scale: float) -> Named:
    """One adapter's tensors, U and e so that `scale` times them is what `weight` asks for; nothing where it is not."""
    method, p = operand.method, operand.parts.get(site.path)
    assert isinstance(method, Bottleneck)
    if p is None:
        zeros = torch.zeros(site.width, dtype=torch.float64)
        return {"down": zeros[None, :][:0], "down_bias": zeros[:0], "up": zeros[:, None][:, :0], "up_bias": zeros}
    ratio = weight * method.scale / scale
    return {name: wide(tensor) * (ratio if name.startswith("up") else 1.0) for name, tensor in p.items()}


def _averaged(terms: Terms, what: str) -> Named:
    total = sum(weight for weight, _ in terms)
    require(abs(total - 1) < OFF, f"the weights sum to {total:g}; those of an average of {what} must sum to 1.")
    keys = {label: set(operand.bundle.tensors) for label, operand in enumerate(operand for _, operand in terms)}
    require(len(set(map(frozenset, keys.values()))) == 1, f"an average of {what} needs the same sites in all of them.")
    return _by_key(terms, lambda weight, tensor: weight * wide(tensor))


def _by_key(terms: Terms, weighted: Callable[[float, Tensor], Tensor]) -> Named:
    found: Named = {}
    for weight, operand in terms:
        for path, parts in operand.parts.items():
            for name, tensor in parts.items():
                key, here = f"{path}:{name}", weighted(weight, tensor)
                if key in found and found[key].shape != here.shape:
                    was, now = list(found[key].shape), list(here.shape)
                    raise AdapterError(f"{key} has the shape {was} in one adapter and {now} in {operand.label!r}.")
                found[key] = found[key] + here if key in found else here
    return found


def _require_alike(how: str, terms: Terms, fields: Sequence[str]) -> None:
    for field in fields:
        values: Mapping[str, object] = {operand.label: getattr(operand.method, field) for _, operand in terms}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{value!r} for {label!r}" for label, value in values.items())
            raise AdapterError(f"how={how!r} needs one {field}, which is {said}.")
