"""Two adapters beside each other, site by site: sizes, angle, and how far they work in the same subspaces."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import singledispatch
from typing import TypeAlias

import torch
from torch import Tensor, nn

from adapters._algebra.bases import bases_apart
from adapters._algebra.comparison import DiffReport
from adapters._algebra.measures import NOTHING, SiteDiff, average
from adapters._algebra.operands import Operand, attached, low_rank, stored, union
from adapters._algebra.thin import inner, norm, overlap, spaces, summed, wide
from adapters._contract import Factors, Method
from adapters._errors import AdapterError
from adapters._store.bundle import Bundle
from adapters.methods.bottleneck import Bottleneck
from adapters.methods.ia3 import IA3

Source: TypeAlias = str | os.PathLike[str] | Bundle | tuple[nn.Module, str]


def diff(a: Source, b: Source) -> DiffReport:
    """Compares two adapters: how large each is, how far apart, at what angle, and how much their subspaces overlap.

    Low-rank changes are compared as changes of the weight, s B A, from their factors alone; other methods by their
    tensors. The overlap of two spaces is the mean squared cosine of the angles between them, |P^T Q|^2 / min(i, j), 1
    where the smaller lies in the other (LoRA, arXiv 2106.09685, section 7.2): of the column spaces, what changes in a
    site's outputs, and of the row spaces, what of its inputs the change reads.

    Args:
        a, b: folders, or what `read` returned of them, which need no model unless PEFT wrote them; or (model, name) of
            an attached adapter.

    Raises:
        AdapterError: an unknown name, a folder that cannot be read, or adapters without a site in common.

    Example:
        >>> import adapters, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> _ = adapters.attach(model, "lora", name="fr", rank=4)
        >>> for p in model.parameters():
        ...     _ = p.requires_grad and torch.nn.init.normal_(p)
        >>> _ = adapters.combine(model, "half", {"fr": 0.5})
        >>> found = adapters.diff((model, "fr"), (model, "half"))
        >>> f"{found.cosine:.3f} {found.size_b / found.size_a:.3f}"
        '1.000 0.500'
    """
    model = next((source[0] for source in (a, b) if isinstance(source, tuple)), None)
    first, second = _read(a, model), _read(b, model)
    notes = [why] if (why := bases_apart(first.bundle, second.bundle)) else []
    sites = [_at(path, first, second) for path in (site.path for site in union([first, second]))]
    sites += [_whole(key, first, second) for key in dict.fromkeys([*first.replaced, *second.replaced])]
    if not any(site.shared for site in sites):
        kinds = f"{first.label!r} is a {first.method.name} and {second.label!r} a {second.method.name}"
        where = "at the same sites" if set(first.sites) & set(second.sites) else "at different sites"
        raise AdapterError(f"these adapters have nothing in common to compare: {kinds}, {where}.")
    other = [site.path for site in sites if not site.shared and not math.isnan(site.size_a + site.size_b)]
    notes += [f"{len(other)} sites have tensors of other shapes, such as {other[0]}"] if other else []
    return DiffReport(first.label, second.label, first.method.name, second.method.name, tuple(sites), tuple(notes))


def _read(source: Source, model: nn.Module | None) -> Operand:
    if isinstance(source, tuple):
        return attached(*source)
    return stored(source, model)


def _at(path: str, a: Operand, b: Operand) -> SiteDiff:
    site = a.sites.get(path) or b.sites[path]
    lows = [low_rank(each, path) if path in each.sites else None for each in (a, b)]
    held = [each.parts[path] if path in each.sites else None for each in (a, b)]
    about = (path, site.role, site.block)
    if all(low is not None or parts is None for low, parts in zip(lows, held, strict=True)):
        return _of_products(about, *lows)
    vectors = [None if parts is None else moved(each.method, parts) for each, parts in zip((a, b), held, strict=True)]
    found = _of_vectors(about, *vectors)
    linear = [None if parts is None else product(each.method, parts) for each, parts in zip((a, b), held, strict=True)]
    return found if linear[0] is None or linear[1] is None else _with_spaces(found, linear[0], linear[1])


def _whole(key: str, a: Operand, b: Operand) -> SiteDiff:
    """A tensor that replaces one of the base's."""
    held = [each.replaced.get(key) for each in (a, b)]
    vectors = [None if tensor is None else {key: wide(tensor)} for tensor in held]
    return _of_vectors((key, "head" if ":head." in key else "tokens", ""), *vectors)


def _of_products(about: tuple[str, str, str], a: Factors | None, b: Factors | None) -> SiteDiff:
    size_a, size_b = (NOTHING if low is None else norm(low) for low in (a, b))
    rank_a, rank_b = (0 if low is None else low.left.shape[-1] for low in (a, b))
    found = SiteDiff(*about, size_a, size_b, rank_a=rank_a, rank_b=rank_b)
    if a is None or b is None:
        return found
    apart, cosine = norm(summed([(1.0, a), (-1.0, b)])), _cosine(inner(a, b), size_a * size_b)
    return _with_spaces(replace(found, difference=apart, cosine=cosine), a, b)


def _cosine(product: float, sizes: float) -> float:
    return max(-1.0, min(1.0, product / sizes)) if sizes else NOTHING


def _with_spaces(found: SiteDiff, a: Factors, b: Factors) -> SiteDiff:
    pairs = list(zip(spaces(a), spaces(b), strict=True))
    outputs = average([overlap(p, q) for (p, _), (q, _) in pairs])
    inputs = average([overlap(p, q) for (_, p), (_, q) in pairs])
    chances = [average([_chance(x[side], y[side]) for x, y in pairs]) for side in (0, 1)]
    return replace(found, outputs=outputs, inputs=inputs, chance_outputs=chances[0], chance_inputs=chances[1])


def _chance(p: Tensor, q: Tensor) -> float:
    """What two random spaces of these dimensions overlap on average: E |P^T Q|^2 = i j / n."""
    return max(p.shape[1], q.shape[1]) / p.shape[0] if min(p.shape[1], q.shape[1]) else NOTHING


def _of_vectors(
    about: tuple[str, str, str], a: Mapping[str, Tensor] | None, b: Mapping[str, Tensor] | None
) -> SiteDiff:
    flat = [None if held is None else torch.cat([held[key].flatten() for key in sorted(held)]) for held in (a, b)]
    size_a, size_b = (NOTHING if each is None else float(each.norm()) for each in flat)
    x, y = flat
    alike = a is not None and b is not None and {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    if x is None or y is None or not alike:
        return SiteDiff(*about, size_a, size_b)
    return SiteDiff(*about, size_a, size_b, float((x - y).norm()), _cosine(float(x @ y), size_a * size_b))


@singledispatch
def moved(method: Method, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors at a site, less what they are where they change nothing."""
    return {key: wide(tensor) for key, tensor in parts.items()}


@moved.register
def _(method: IA3, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: wide(tensor) - 1 for key, tensor in parts.items()}


@singledispatch
def product(method: Method, parts: Mapping[str, Tensor]) -> Factors | None:
    """Matrices whose column space the outputs move in, and whose row space is read, where a method has such."""
    return None


@product.register
def _(method: Bottleneck, parts: Mapping[str, Tensor]) -> Factors | None:
    return Factors(parts["up"], parts["down"], method.scale)
