"""Residual branches: what is added back to the stream it was computed from, and the module that returns it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from adapters._contract import Key
from adapters._sites.graph import Call, Graph, Use, Value, ancestors
from adapters._sites.operands import COPIES, CURVES, SUMS, TIMES, TOKEN_MIXES

SCANNED = 8  # slices of one value, each of a dimension less, that a loop over tokens takes; the probe has 12 tokens
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # what is added to them would be iterated over


@dataclass(eq=False, slots=True)
class Branch:
    """`value`, computed from `stream` through `uses`, is added back to it in `total`; `call` returned it as `key`.

    `returned` is that output: `value` itself, or what became it through a norm that follows the module. Where no module
    returns it alone, the branch is `loose`, and `call` the one in which it is added.
    """

    stream: Value
    value: Value
    total: Value
    inside: dict[int, Value]
    uses: list[Use]
    call: Call
    key: Key
    returned: Value
    kind: str
    loose: bool = False

    @property
    def sites(self) -> list[Use]:
        return [use for use in self.uses if use.linear]

    @property
    def curved(self) -> bool:
        """Whether an activation function lies in it."""
        return any(v.op in CURVES and v.live for i, v in self.inside.items() if i > self.stream.index)


def find_branches(graph: Graph, modules: Mapping[str, nn.Module]) -> tuple[list[Branch], list[Branch]]:
    """All branches in order of execution, one per output of a module call; and those that no module returns alone."""
    found: dict[tuple[int, str, Key], Branch] = {}
    loose: list[Branch] = []
    for total in graph.values:
        if total.op not in SUMS or not total.floating or len(total.shape) < 2:
            continue
        terms, partial = _terms(graph, total)
        for value in terms if len(terms) > 1 else ():
            branch = _branch(graph, modules, total, value, [t for t in terms + partial if t is not value])
            if branch is None:
                continue
            branch.kind = kind_of(graph, branch)
            same = (branch.call.start, branch.call.path, branch.key)
            if branch.loose:
                loose.append(branch)
            elif same not in found or branch.stream.index < found[same].stream.index:
                found[same] = branch
    placed = without_nested(list(found.values()))
    shapes = {branch.total.shape for branch in placed}
    return placed, [b for b in loose if b.total.shape in shapes and _is_deep(graph, b.inside, b.sites)]


def _terms(graph: Graph, total: Value) -> tuple[list[Value], list[Value]]:
    """The activations a sum is made of, looking through sums of sums, and the partial sums in between."""
    terms: list[Value] = []
    partial: list[Value] = []
    for parent in total.parents:
        if not parent.floating or parent.weights or parent.shape != total.shape:
            continue
        bare = parent
        while (bare.op in COPIES or (bare.op in TIMES and len(bare.parents) == 1)) and len(bare.active) == 1:
            bare = bare.active[0]  # a copy, or a multiple by a plain number
        if bare.op in SUMS and bare.index not in graph.producers and _addends(bare) == 2:
            inner, between = _terms(graph, bare)
            terms += inner
            partial += [*between, bare]
        else:
            terms.append(parent)
    return terms, partial


def _addends(value: Value) -> int:
    return sum(p.floating and not p.weights and p.shape == value.shape for p in value.parents)


def _plain_sources(value: Value) -> list[tuple[Value, bool]]:
    """The value and what it came from through a few steps that have one activation: a norm, a scale.

    One projection on the way, as on the shortcuts of convolutional nets, is marked with True from there on.
    """
    sources, projected = [(value, False)], False
    for _ in range(5):
        if value.use is not None and not projected:
            projected, value = True, value.use.x
        elif value.use is None and len(value.active) == 1:
            value = value.active[0]
        else:
            break
        sources.append((value, projected))
    return sources


def _branch(
    graph: Graph, modules: Mapping[str, nn.Module], total: Value, value: Value, others: list[Value]
) -> Branch | None:
    """The branch that ends in `value`: it starts at the nearest source of the other terms that it was made from."""
    sources = {
        source.index: (source, projected)
        for other in others
        for source, projected in reversed(_plain_sources(other))
        if source.index < value.index
    }
    for index in sorted(sources, reverse=True):
        stream, projected = sources[index]
        inside = ancestors(value, index)
        uses = [v.use for i, v in sorted(inside.items()) if i > index and v.use is not None]
        if index not in inside or not uses or (projected and not _is_deep(graph, inside, uses)):
            continue
        # a convolution after the sub-block is not the sub-block, unless the branch has nothing else
        of_sites = [use for use in uses if use.linear] or uses
        place = _returned_by(graph, modules, stream, value, inside, of_sites)
        call, key, returned = place if place is not None else (graph.around(total), None, value)
        return Branch(stream, value, total, inside, uses, call, key, returned, "", place is None)
    return None


def _is_deep(graph: Graph, inside: dict[int, Value], uses: list[Use]) -> bool:
    """Whether more happens than one product: two projections of one value that are added up are no residual."""
    return len(uses) > 1 and (
        any(use.x.index != uses[0].x.index for use in uses) or any(index in graph.mixers for index in inside)
    )


def _returned_by(
    graph: Graph,
    modules: Mapping[str, nn.Module],
    stream: Value,
    value: Value,
    inside: dict[int, Value],
    uses: list[Use],
) -> tuple[Call, Key, Value] | None:
    """The outermost call that holds a use of the branch and returned its value, or what a later norm was given.

    A norm after the sub-block (sandwich norms) has no weight site, so the walk goes on to its input: the sub-block
    sees the branch's input, which the norm does not. Scales, gates and changes of layout are passed as well, products
    of activations are not: scores plus a bias are a sum too, and no branch.
    """
    size = prod(value.shape)
    for _ in range(10):
        if value.index <= stream.index:
            return None
        calls = graph.producers.get(value.index, [])
        fit = [
            (call, key)
            for call, key in calls
            if call.start > stream.index
            and any(call.holds(use.index) for use in uses)
            and not isinstance(modules[call.path], CONTAINERS)
        ]
        if fit:
            call, key = min(fit, key=lambda pair: pair[0].order)
            return call, key, value
        outer = [call for call, _ in calls if call.start > stream.index and call.inputs]
        given = [v for call in outer[-1:] for v in call.inputs.values() if v.index in inside and v is not value]
        if not given and (value.use is not None or value.index in graph.mixers):
            return None
        earlier = [p for p in given or value.active if p.index in inside and prod(p.shape) == size]
        if not earlier:
            return None
        value = given[0] if given else max(earlier, key=lambda p: p.index)
    return None


def kind_of(graph: Graph, branch: Branch) -> str:
    """attention where a softmax weighs values, ssm where else tokens are mixed, mlp where they are not.

    Where the returned module is the whole sub-block, only what happens inside it counts: in two-stream encoders the
    branch of one stream begins before the sub-block of the other.
    """
    start = branch.stream.index
    steps = [v for i, v in branch.inside.items() if start < i <= branch.returned.index and v.floating]
    whole = [use for use in branch.sites if branch.call.holds(use.index)]
    if len(whole) > 1 and any(v.shape == branch.returned.shape for v in branch.call.inputs.values()):
        steps = [v for v in steps if branch.call.holds(v.index)]
    here = {v.index for v in steps}
    if any(a.query.index in here for a in graph.attentions) or here & graph.softmax_attentions:
        return "attention"
    mixed = bool(here & graph.mixers) or any(mixes_tokens(graph, v) for v in steps)
    return "ssm" if mixed else "mlp"


def mixes_tokens(graph: Graph, value: Value) -> bool:
    """A convolution along the tokens, a Fourier transform, a cumulative sum; or slices one by one, as in a scan."""
    if value.op in TOKEN_MIXES and len(value.shape) >= 3 and not value.weights:
        return value.use is None or value.use.spread
    return graph.slices[value.index] >= SCANNED


def without_nested(branches: list[Branch]) -> list[Branch]:
    """Drops a branch that holds several others, which is a container, and one that is the only one inside another.

    One that starts where the other does is not inside it: the other merely skips further back.
    """
    ordered = sorted(branches, key=lambda branch: branch.returned.index)
    indices = [branch.returned.index for branch in ordered]
    dropped: set[int] = set()
    for branch in ordered:
        near = ordered[bisect_right(indices, branch.stream.index) : bisect_left(indices, branch.returned.index)]
        within = [other for other in near if _within(other, branch)]
        deeper = [other for other in within if other.stream.index > branch.stream.index]
        if deeper and len(within) == 1:
            dropped.add(id(deeper[0]))
        elif deeper:
            dropped.add(id(branch))
    return [branch for branch in ordered if id(branch) not in dropped]


def _within(inner: Branch, outer: Branch) -> bool:
    starts = inner.stream.index >= outer.stream.index and inner.call.start >= outer.stream.index
    return starts and inner.returned.index in outer.inside
