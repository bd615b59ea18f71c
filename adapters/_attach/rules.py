"""With which others an adapter can act, and how: what has no mathematics, or none here, is refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from adapters._attach.acting import Chain, Mean, Node
from adapters._attach.per_row import adapters_in
from adapters._attach.state import Adapter
from adapters._contract import StreamMethod
from adapters._errors import AdapterError

_EXACT = 1e-6


def check_stack(parts: Sequence[Node]) -> None:
    """Refuses changes of a changed weight where its change cannot be followed: inside compositions, and by scaling."""
    for first, second in combinations(parts, 2):
        simple = isinstance(first, Adapter) and isinstance(second, Adapter)
        for a in adapters_in(first):
            for b in adapters_in(second):
                _check_order(a, b, simple)
    _at_most_one_in_layers(each for part in parts for each in adapters_in(part))


def _check_order(first: Adapter, second: Adapter, simple: bool) -> None:
    a, b = first.traits, second.traits
    reformed = (b.other - b.outputs) & (a.scaled if simple else a.scaled | a.added | a.other)
    twice = reformed | (b.scaled & (a.added | (a.other - a.outputs)))
    if twice:
        raise AdapterError(
            f"{second.name!r} ({second.method.name}) after {first.name!r} at {min(twice)} would change a weight in a "
            "way that its output does not show: stack it the other way round, or average them."
        )


def check_fused(fusion: Adapter, parts: Sequence[Node]) -> None:
    """Refuses parts that change no streams."""
    for part in parts:
        if not isinstance(part, Adapter) or not isinstance(part.method, StreamMethod):
            what = part.name if isinstance(part, Adapter) else "a fusion or composition"
            raise AdapterError(f"{what!r} is a part of the fusion {fusion.name!r}, and changes no streams by itself.")


def check_average(mean: Mean, base: int | None) -> None:
    """Refuses what cannot be averaged: tokens, virtual tokens in layers, prefixes of unlike lengths, unlike heads."""
    every = [adapter for part in mean.parts for adapter in adapters_in(part)]
    if all(adapter.traits.plain for adapter in every):
        return
    for adapter in every:
        if adapter.tokens is not None or adapter.traits.layers:
            what = "rows of tokens" if adapter.tokens is not None else "virtual tokens in its layers"
            raise AdapterError(f"{adapter.name!r} has {what}, which cannot be averaged.")
    for a in every:
        for b in every:
            crossed = a.traits.scaled & b.traits.other
            if crossed:
                raise AdapterError(
                    f"{a.name!r} scales the inputs at {min(crossed)} where {b.name!r} changes the weight."
                )
    _check_prefixes(mean, [adapter for adapter in every if adapter.traits.prefix])
    _check_heads(every, base)


def _check_prefixes(mean: Mean, prefixes: Sequence[Adapter]) -> None:
    lengths = [prefix_length(part) for part in mean.parts]
    held = [(length, weight) for length, weight in zip(lengths, mean.weights, strict=True) if length]
    if not held:
        return
    if len({length for length, _ in held}) > 1:
        raise AdapterError(f"prefixes of {', '.join(str(length) for length, _ in held)} tokens cannot be averaged.")
    if len({frozenset(site.path for site in adapter.sites) for adapter in prefixes}) > 1:
        names = ", ".join(repr(adapter.name) for adapter in prefixes)
        raise AdapterError(f"the prefixes {names} stand in different attentions, and cannot be averaged.")
    if abs(sum(weight for _, weight in held) - 1) > _EXACT:
        total = sum(weight for _, weight in held)
        raise AdapterError(f"the weights of averaged prefixes sum to {total:g}, and must sum to 1.")


def prefix_length(node: Node) -> int:
    """The virtual tokens before the keys under a node that gives all rows the same."""
    if isinstance(node, Adapter):
        length: int = node.traits.prefix
        return length
    if isinstance(node, Chain):
        return sum(map(prefix_length, node.parts))
    return max(map(prefix_length, node.parts), default=0) if isinstance(node, Mean) else 0


def check_split(parts: Sequence[Node]) -> None:
    """Refuses adapters whose tokens cannot be told apart."""
    for part in parts:
        for adapter in adapters_in(part):
            if adapter.traits.unsplit:
                raise AdapterError(f"{adapter.name!r} cannot act on a part of the tokens: {adapter.traits.unsplit}.")


def shift(node: Node) -> int:
    """By how many positions the prefixes under a node, which gives all rows the same, move the tokens."""
    if isinstance(node, Adapter):
        own: int = node.traits.shift
        return own
    if isinstance(node, Chain):
        return sum(map(shift, node.parts))
    return max(map(shift, node.parts), default=0) if isinstance(node, Mean) else 0


def check_rows(parts: Sequence[Node], adapters: Sequence[Adapter], base: int | None) -> str:
    """Why rows must run by selection, or nothing; refuses heads of which each has other outputs.

    Args:
        parts: what acts on rows, each once, and the adapters in them.
        base: the number of labels of the base's own head, if a row uses that.
    """
    if all(adapter.traits.plain for adapter in adapters):
        return ""
    _check_heads(adapters, base)
    if len(set(map(shift, parts))) > 1:  # where a model counts its positions from, it alone knows
        return "prefixes of other lengths move the tokens of their rows to other positions"
    return next((f"{each.name!r}: {each.traits.unfollowed}" for each in adapters if each.traits.unfollowed), "")


def _check_heads(adapters: Sequence[Adapter], base: int | None) -> None:
    outputs = {len(each.labels): repr(each.name) for each in adapters if each.head and each.labels}
    if outputs and base is not None:
        outputs.setdefault(base, "the base")
    if len(outputs) > 1:
        counts = ", ".join(f"{name} {count}" for count, name in outputs.items())
        raise AdapterError(f"heads with other numbers of labels give no common output: {counts}.")


def _at_most_one_in_layers(adapters: Iterable[Adapter]) -> None:
    names = [adapter.name for adapter in adapters if adapter.traits.layers]
    if len(names) > 1:
        raise AdapterError(f"{', '.join(names)} all insert virtual tokens, of which one adapter at a time can act.")
