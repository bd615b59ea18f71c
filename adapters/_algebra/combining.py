"""One adapter out of several: weighted sums, exact or at a given rank, and what PEFT's functions make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from adapters._algebra.operands import Operand, attached, is_low_rank, union
from adapters._algebra.replaced import replaced
from adapters._algebra.reports import CombineReport
from adapters._algebra.tensorwise import joined
from adapters._algebra.ways import OF_ELEMENTS, Majority, Way
from adapters._algebra.weighted import Made, Terms, of_weights, stored_as
from adapters._attach import install
from adapters._attach.install import check_attachable
from adapters._contract import Site, WeightMethod, WeightSite
from adapters._errors import AdapterError
from adapters._store.bundle import Bundle
from adapters._store.record import json_safe


def combine(
    model: nn.Module,
    name: str,
    weights: Mapping[str, float],
    how: str = "cat",
    rank: int | None = None,
    *,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
    activate: bool = True,
) -> CombineReport:
    """Makes a new, frozen adapter out of attached ones, which stay: the weighted sum of what they change.

    Task arithmetic (Ilharco et al., 2023, arXiv 2212.04089) is "cat" or "svd" with weights of any size and sign.

    Args:
        weights: of each adapter, by name: {"fr": 0.3, "formal": 0.7}; a negative one takes away.
        how: "cat" is exact, W' = W + sum_i w_i s_i B_i A_i, its rank the sum of the ranks; adapters may differ in rank
            and in sites. Bottlenecks are put side by side, likewise exactly.
            "svd" is the best approximation of that sum at `rank`, also of what DoRA or IA3 make of the weights.
            "linear" adds tensors. For low-rank adapters of one rank that is PEFT's "linear", into which products of one
            adapter's B and another's A come: it is not the sum, and the report says how far from it. Bottlenecks and
            prefixes are averaged, by weights that sum to 1; IA3's sum is exact.
            "ties", "dare_linear", "dare_ties", "magnitude_prune" choose among the elements of every W' - W (in PEFT
            "ties_svd" and so on); what they make is approximated at `rank`, with the error of that step.
        rank: of the result, at most; None takes the largest rank that went in.
        density: the share of elements that "ties" and its kind keep: in TIES' paper 0.2, in DARE's 0.1.
        majority: TIES' vote on each sign: "total" by size, "frequency" by number.
        seed: of DARE's random choice, which leaves the global random state alone.
        activate: whether the new adapter acts at once.

    Raises:
        AdapterError: an unknown name, a weight that is not finite, or adapters of which there is no such combination.

    Example:
        >>> import adapters
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> _ = [adapters.attach(model, "lora", name=name, rank=4) for name in ("fr", "formal")]
        >>> adapters.combine(model, "both", {"fr": 0.3, "formal": 0.7}).sites[0].rank
        8
    """
    check_attachable(model, name)
    terms = [(weight, attached(model, key)) for key, weight in checked(weights).items()]
    way = Way(how, rank, density, majority, seed)
    bundle, report = combined(name, terms, way)
    put(model, bundle, activate)
    return report


def subtract(
    model: nn.Module, name: str, a: str, b: str, how: str = "cat", rank: int | None = None, activate: bool = True
) -> CombineReport:
    """Makes a new, frozen adapter that changes what `a` does and `b` does not: `combine` with the weights 1 and -1.

    Args:
        how, rank, activate: as `combine`'s.

    Raises:
        AdapterError: as `combine`.
    """
    if a == b:
        raise AdapterError(f"{a!r} less itself is nothing: name two adapters.")
    return combine(model, name, {a: 1.0, b: -1.0}, how, rank, activate=activate)


def combined(name: str, terms: Terms, way: Way) -> tuple[Bundle, CombineReport]:
    """The combination as a value, without a model. Terms of weight 0 are left out, where nothing votes."""
    held = [term for term in terms if term[0] != 0 or way.how in OF_ELEMENTS]
    if not held:
        raise AdapterError("every weight is 0, which leaves nothing: activate None for the base.")
    weights = {operand.label: weight for weight, operand in terms}
    if len(held) == 1 and held[0][0] == 1 and way.how in ("cat", "linear"):
        return _same(name, held[0][1], weights, way)
    sites, kept = union([operand for _, operand in held]), replaced(held)
    made, dtype = _made(held, way, sites), stored_as(held)
    tensors = made.tensors | {key: tensor.to(dtype) for key, tensor in kept.tensors.items()}
    facts = {"combined": json_safe({"weights": weights, **way.settings})}
    bundle = Bundle(name, made.method, sites, tensors, kept.head, facts=facts, labels=kept.labels, tokens=kept.tokens)
    size = sum(tensor.numel() for tensor in tensors.values())
    notes = (*made.notes, *kept.notes)
    return bundle, CombineReport(name, made.method.name, weights, way.settings, made.sites, size, notes)


def put(model: nn.Module, bundle: Bundle, activate: bool, trainable: bool = False) -> None:
    """Attaches what was computed."""
    install(
        model,
        bundle.name,
        bundle.method,
        bundle.sites,
        bundle.tensors,
        head=bundle.head,
        trainable=trainable,
        activate=activate,
        facts=bundle.facts,
        labels=bundle.labels,
        tokens=bundle.tokens,
    )


def checked(weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(f"weights are {weights!r}; give one for each adapter, as {{'fr': 0.3, 'formal': 0.7}}.")
    for key, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise AdapterError(f"the weight of {key!r} is {weight!r}; it must be a finite number.")
    return {key: float(weight) for key, weight in weights.items()}


def _same(name: str, operand: Operand, weights: Mapping[str, float], way: Way) -> tuple[Bundle, CombineReport]:
    """One adapter at weight 1: a copy, bit for bit, of any method."""
    tensors = {key: tensor.clone() for key, tensor in operand.bundle.tensors.items()}
    bundle = replace(operand.bundle, name=name, tensors=tensors)
    size, method = sum(tensor.numel() for tensor in tensors.values()), operand.method.name
    return bundle, CombineReport(name, method, weights, way.settings, (), size, ("a copy, bit for bit",))


def _made(terms: Terms, way: Way, sites: Sequence[Site]) -> Made:
    first, kinds = terms[0][1].method, {type(operand.method) for _, operand in terms}
    thin = all(is_low_rank(operand) for _, operand in terms)
    weights = all(isinstance(operand.method, WeightMethod) for _, operand in terms)
    if thin or (weights and way.how not in ("cat", "linear")):
        return of_weights(terms, way, cast(Sequence[WeightSite], sites))
    if len(kinds) > 1:
        named = ", ".join(f"{operand.label!r} is a {operand.method.name}" for _, operand in terms)
        raise AdapterError(f"how={way.how!r} cannot put different methods into one adapter: {named}.")
    found = joined(first, way.how, terms, sites)
    stored = {key: tensor.to(stored_as(terms)).contiguous() for key, tensor in found.tensors.items()}
    return Made(found.method, stored, notes=(found.meaning,))
