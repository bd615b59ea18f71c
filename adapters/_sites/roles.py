"""What each weight does, read off the dataflow: back from the attentions, and by order within a branch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from adapters._sites.graph import Attention, Graph, Use, Value, ancestors
from adapters._sites.operands import CHOICES, CURVES, NARROWS, TIMES
from adapters._sites.streams import Branch


def find_roles(graph: Graph, branches: list[Branch]) -> dict[str, str]:
    """The role of every weight that lies in a branch or feeds an attention; a branch's word goes first."""
    by_hand = [Attention(each.query, each.key, each.value) for each in graph.written if each.softmax]
    attentions = [*graph.attentions, *by_hand]
    roles: dict[str, str] = {}
    for branch in branches:
        inside = [a for a in attentions if a.query.index in branch.inside]
        for weight, role in _branch_roles(graph, branch, inside).items():
            roles.setdefault(weight, role)
    for weight, role in _projections(graph.attentions, _nearest).items():
        roles.setdefault(weight, role)
    return roles


def _branch_roles(graph: Graph, branch: Branch, attentions: list[Attention]) -> dict[str, str]:
    if branch.kind == "mlp":
        return _mlp(branch)
    if branch.kind == "ssm":
        fed = _fed(branch)
        return {w: "ssm.in" if use.index in fed else "ssm.out" for use in branch.sites for w in use.weights}
    roles = _projections([a for a in attentions if a.path] or attentions, _nearest)
    mixed = _after(branch, graph.mixers)
    for use in branch.sites:
        if use.x.index in mixed:
            roles.update({w: "attention.output" for w in use.weights if w not in roles})

    def deep(value: Value) -> set[str]:  # low-rank attention: projections before the projection
        return {w for v in ancestors(value, branch.stream.index + 1).values() if v.use for w in v.use.weights}

    found = _projections(attentions, deep) | roles
    for use in branch.sites:
        if not use.weights & found.keys() and _gates(branch, use, mixed, graph.mixers):
            found.update(dict.fromkeys(use.weights, "attention.gate"))
    return found


def _gates(branch: Branch, use: Use, mixed: set[int], mixers: frozenset[int]) -> bool:
    """Whether a product's result, before another weight, multiplies what was made from the attention."""
    reached = {use.index}
    for index, value in sorted(branch.inside.items()):
        parents = [p.index for p in value.active]
        if index <= use.index or value.use is not None or index in mixers or not reached.intersection(parents):
            continue
        if value.op in TIMES and len(parents) == 2 and mixed.intersection(parents) - reached:
            return True
        reached.add(index)
    return False


def _nearest(value: Value) -> set[str]:
    """The weights of the last products before `value`."""
    found: set[str] = set()
    seen: set[int] = set()
    todo = [value]
    while todo:
        step = todo.pop()
        if step.index in seen:
            continue
        seen.add(step.index)
        if step.use is not None and step.use.linear:
            found |= step.use.weights
        else:
            todo.extend(step.parents)
    return found


def _projections(attentions: Iterable[Attention], weights: Callable[[Value], set[str]]) -> dict[str, str]:
    feeds: dict[str, set[str]] = defaultdict(set)
    for attention in attentions:
        for letter, value in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            for weight in weights(value):
                feeds[weight].add(letter)
    names = {"q": "query", "k": "key", "v": "value", "kv": "kv"}
    return {w: f"attention.{names.get(''.join(sorted(letters)), 'qkv')}" for w, letters in feeds.items()}


def _after(branch: Branch, points: frozenset[int]) -> set[int]:
    """Indices of the branch's values that are made from one of `points`, themselves included."""
    found: set[int] = set()
    for index, value in sorted(branch.inside.items()):
        if index > branch.stream.index and (index in points or any(p.index in found for p in value.parents)):
            found.add(index)
    return found


def _fed(branch: Branch) -> set[int]:
    """Uses of the branch whose result reaches a later use."""
    sources = _Sources(branch)
    return sources.fed


def _mlp(branch: Branch) -> dict[str, str]:
    sources = _Sources(branch)
    roles: dict[str, str] = {}
    for use in branch.sites:
        for weight in use.weights:
            roles.setdefault(weight, sources.role(use))
    return roles


class _Sources:
    """Follows every product through a branch to where it is chosen from, gated, or multiplied again."""

    def __init__(self, branch: Branch) -> None:
        self.chosen: set[int] = set()
        self.fused: set[int] = set()
        self.gates: set[int] = set()
        self.fed: set[int] = set()
        # value -> (use, part of its output) -> whether an activation function lies in between
        self._of: dict[int, dict[tuple[int, int], bool]] = {}
        for index, value in sorted(branch.inside.items()):
            if index > branch.stream.index:
                self._of[index] = self._step(value)

    def role(self, use: Use) -> str:
        if use.index in self.chosen or use.units == 1:  # one unit wide: how much of a shared expert to add
            return "router"
        if use.index in self.fused:
            return "mlp.gate_up"
        if use.index in self.gates:
            return "mlp.gate"
        return "mlp.up" if use.index in self.fed else "mlp.down"

    def _step(self, value: Value) -> dict[tuple[int, int], bool]:
        merged: dict[tuple[int, int], bool] = {}
        for parent in value.active:
            for source, curved in self._of.get(parent.index, {}).items():
                merged[source] = merged.get(source, False) or curved
        uses = {use for use, _ in merged}
        if value.use is not None and value.use.linear:
            self.fed |= uses
            return {(value.index, -1): False}
        self._note(value, uses)
        if value.op in CURVES:
            return dict.fromkeys(merged, True)
        if value.op in NARROWS and value.active and value.shape[-1:] < value.active[0].shape[-1:]:
            return {(use, value.index if part < 0 else part): curved for (use, part), curved in merged.items()}
        return merged

    def _note(self, value: Value, uses: set[int]) -> None:
        if value.op in CHOICES or (value.op == "max" and not value.floating):
            self.chosen |= uses
        if value.op == "glu":
            self.fused |= uses
        if value.op in TIMES and len(value.active) == 2:
            self._times(*value.active)

    def _times(self, left: Value, right: Value) -> None:
        a, b = self._of.get(left.index, {}), self._of.get(right.index, {})
        if left.shape[-1:] != right.shape[-1:] or not a or not b or a.keys() & b.keys():
            return
        uses_a, uses_b = {use for use, _ in a}, {use for use, _ in b}
        if uses_a & uses_b:
            self.fused |= uses_a & uses_b
        elif any(a.values()) != any(b.values()):
            self.gates |= uses_a if any(a.values()) else uses_b
