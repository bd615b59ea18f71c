"""Resolves selections: names into adapters, compositions into nodes; what has no mathematics is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters._attach.acting import Chain, Fused, Mean, Node, Spans
from adapters._attach.batches import Repeated
from adapters._attach.per_row import PerRow, adapters_in
from adapters._attach.rules import check_average, check_fused, check_rows, check_split, check_stack
from adapters._attach.state import NOBODY, Acting, Adapter, Chosen, State
from adapters._contract import FusionMethod
from adapters._errors import AdapterError
from adapters._selection import Average, Parallel, Part, Selection, Split, Stack

REMEMBERED = 256  # selections
PARTS = 4096  # of selections; a name, and what it means, takes 0.1 KB, a composition 0.5 KB


@dataclass(frozen=True)
class SelectionReport:
    """What acts from now on. `runs` counts the forwards that a batch takes, which `why` explains where it is not 1."""

    selection: Selection
    adapters: tuple[str, ...]
    runs: int = 1
    why: str = ""

    def __str__(self) -> str:
        acting = ", ".join(map(repr, self.adapters)) or "the base alone"
        lines = [f"{self.selection!r}: {acting}, in one forward" if self.runs == 1 else f"{self.selection!r}: {acting}"]
        if self.runs != 1:
            lines.append(f"  a batch takes {self.runs} forwards, one for each distinct selection: {self.why}")
        return "\n".join(lines)


def resolve(state: State, selection: Selection) -> Acting:
    """What a selection means for the adapters that are attached.

    Raises:
        AdapterError: a name is not attached, or the parts cannot act in this way.
    """
    if selection is None:
        return NOBODY
    resolved = state.resolved  # replaced together with the adapters
    cache, nodes = resolved.selections, resolved.nodes
    value: Any = tuple(selection) if isinstance(selection, list) else selection
    try:
        found = cache.get(value)
    except TypeError as error:
        raise AdapterError(f"{selection!r} is no selection of adapters: {error}.") from error
    if found is None:
        base = len(state.labels) if state.labels else None
        if len(nodes) > PARTS:
            nodes.clear()
        found = _resolved(_Meaning(state.adapters, state.named, base, nodes), value)
        if len(cache) >= REMEMBERED:
            cache.clear()
        cache[value] = found
    return found


def report_of(acting: Acting) -> SelectionReport:
    """What `activate` and `using` tell."""
    value = list(acting.value) if isinstance(acting.value, tuple) else acting.value
    runs = len(set(acting.node.parts)) if acting.separately else 1
    return SelectionReport(value, tuple(adapter.name for adapter in acting), runs, acting.separately)


def base_outputs(parts: tuple[Node, ...], base: int | None) -> int | None:
    """How many labels the base's head has, if a row uses that."""
    if base is None:
        return None
    return base if any(not any(each.head for each in adapters_in(part)) for part in parts) else None


def _resolved(meaning: _Meaning, value: Chosen) -> Acting:
    base = meaning.base
    if isinstance(value, tuple | Parallel):
        parts = tuple(map(meaning.node, value if isinstance(value, tuple) else value.parts))
        if not parts:
            raise AdapterError("an empty list selects nothing: a selection by row has one entry for each row.")
        if isinstance(value, tuple):
            by_row = PerRow(parts)
            outputs = base_outputs(by_row.distinct, base)
            return Acting.of(by_row.adapters, value, by_row, check_rows(by_row.distinct, by_row.adapters, outputs))
        every = tuple(dict.fromkeys(each for part in parts for each in adapters_in(part)))
        return Acting.of(every, value, Repeated(parts), check_rows(parts, every, base_outputs(parts, base)))
    made = meaning.node(value)
    every = adapters_in(made)
    alone = len(set(every)) == len(every)
    in_turn = isinstance(made, Adapter) or made is None or (isinstance(made, Chain) and set(made.parts) <= set(every))
    return Acting.of(dict.fromkeys(every), value, None if in_turn and alone else made)


@dataclass(frozen=True)
class _Meaning:
    """What parts of selections mean; equal parts are one node.

    `base`: the number of labels of the base's own head, where adapters have heads.
    """

    adapters: Mapping[str, Adapter]
    named: Mapping[str, Part]
    base: int | None
    nodes: dict[Part, Node]  # those that are known already

    def node(self, part: Part) -> Node:
        found = self.nodes.get(part)
        if found is None and part is not None:
            found = self.nodes[part] = self._made(part)
        return found

    def _made(self, part: Part) -> Node:
        if isinstance(part, str):
            return self.node(self.named[part]) if part in self.named else self._attached(part)
        if isinstance(part, Stack):
            return _stacked(self._parts(part.parts))
        if not isinstance(part, Average) and not isinstance(part, Split):
            raise AdapterError(f"{part!r} is no selection: a name, None, Stack, Average, Split, or a list by row.")
        parts = self._parts(part.parts)
        return _split(part, parts) if isinstance(part, Split) else _averaged(part, parts, self.base)

    def _parts(self, parts: tuple[Part, ...]) -> tuple[Node, ...]:
        found = tuple(map(self.nodes.get, parts))
        return found if None not in found else tuple(map(self.node, parts))

    def _attached(self, name: str) -> Node:
        if name not in self.adapters:
            there = ", ".join([*self.adapters, *self.named]) or "none"
            raise AdapterError(f"no adapter {name!r} is attached; attached: {there}.")
        adapter = self.adapters[name]
        if isinstance(adapter.method, FusionMethod):
            parts = tuple(map(self.node, adapter.method.parts))
            check_fused(adapter, parts)
            return Fused(adapter, parts)
        return adapter


def _stacked(parts: tuple[Node, ...]) -> Node:
    if len(parts) > 1 and all(isinstance(each, Adapter) and each.traits.stacks for each in parts):
        return Chain(parts)  # nothing to be checked
    some: list[Node] = []
    for each in parts:
        some += () if each is None else each.parts if isinstance(each, Chain) else (each,)
    check_stack(some)
    return some[0] if len(some) == 1 else Chain(tuple(some)) if some else None


def _split(part: Split, parts: tuple[Node, ...]) -> Node:
    check_split(parts)
    return Spans(parts, (0, *part.at), tuple(each for one in parts for each in adapters_in(one)))


def _averaged(part: Average, parts: tuple[Node, ...], base: int | None) -> Node:
    weighted = [(one, weight) for one, weight in zip(parts, part.weights, strict=True) if one is not None and weight]
    if not weighted:
        return None
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0]
    mean = Mean(tuple(one for one, _ in weighted), tuple(weight for _, weight in weighted))
    check_average(mean, base)
    return mean
