"""What acts in a forward, resolved: adapters, and how their changes at one place are put together.

A node gives a place's new output from the old one: an adapter, None, or one of the classes below. The formulas stand
in `adapters._selection`; here they are computed for whatever entries the adapters have at the place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, Union

import torch
from torch import Tensor, nn

from adapters._attach.aligned import by_row, put_back
from adapters._attach.state import Adapter
from adapters._contract import Rows
from adapters._errors import AdapterError


class AtSite(Protocol):
    """An entry that is called after its module, with the input that its adapter sees and the module's output."""

    rows: Rows
    path: str
    additive: bool  # what it adds does not depend on the output

    def source(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...

    def __call__(
        self, x: Any, y: Tensor, p: Mapping[str, Tensor], owned: bool = True, weight: float = 1.0, before: Before = ()
    ) -> Any: ...


Before: TypeAlias = tuple[tuple[AtSite, Mapping[str, Tensor]], ...]  # what has acted at a place, with its tensors
UNKNOWN_ROWS = "a part of the model was called, or compiled, by itself: the rows of the batch are not known there."
Pick: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Of the batch that a forward runs on: its rows, its tokens, and how many tokens of the sequence came before."""

    rows: int
    tokens: int = 0
    before: int = 0


@dataclass(frozen=True)
class Here:
    """One module in one forward: what it was called with, the entries it holds, and which part of it is looked at.

    Once rows are told apart, tensors are seen by row, and `picks` lead from all rows to those of this part.
    """

    held: Mapping[str, nn.Module | None]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: Shape | None
    picks: tuple[Pick, ...] | None = None

    def entry(self, adapter: Adapter) -> Any:
        """The adapter's entry that is called after the module, if there is one."""
        found = self.held.get(adapter.slot)
        return found if hasattr(found, "source") else None

    def x(self, entry: AtSite) -> Any:
        """The input that an entry sees, of this part."""
        x = entry.source(self.args, self.kwargs)
        if self.picks is None or x is None:
            return x
        rows = self._shape().rows
        return self._picked(x, entry) if isinstance(x, Tensor) else _each(x, lambda t: self._picked(t, entry), rows)

    def _picked(self, t: Tensor, entry: AtSite) -> Tensor:
        t = by_row(t, entry.rows, self._shape().rows, entry.path)
        for pick in self.picks or ():
            t = pick(t)
        return t

    def _shape(self) -> Shape:
        if self.shape is None:
            raise AdapterError(UNKNOWN_ROWS)
        return self.shape

    def picking(self, pick: Pick) -> Here:
        return replace(self, picks=(*(self.picks or ()), pick))

    def by_row(self, y: Tensor, rows: Rows, change: Callable[[Here, Tensor], Tensor], path: str) -> Tensor:
        """`change` on the module's output by row, put back into its layout."""
        if self.picks is not None:
            return change(self, y)
        made = put_back(change(replace(self, picks=()), by_row(y, rows, self._shape().rows, path)), rows)
        return made.contiguous() if y.is_contiguous() else made  # models see it through views

    def first(self, adapters: tuple[Adapter, ...]) -> AtSite | None:
        """The entry of the first of these adapters that has one here."""
        return next((entry for entry in map(self.entry, adapters) if entry is not None), None)


def _each(call: Any, change: Pick, rows: int) -> Any:
    """A call's arguments with those changed that hold entries of rows first: as (entries, ...) again."""
    args, kwargs = call

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] % rows:
            return value
        return change(value).flatten(0, 1)

    return tuple(map(changed, args)), {key: changed(value) for key, value in kwargs.items()}


@dataclass(eq=False, slots=True)
class Chain:
    """One after the other."""

    parts: tuple[Node, ...]

    def act(self, here: Here, y: Tensor) -> Tensor:
        before: Before = ()
        for part in self.parts:
            if isinstance(part, Adapter):
                y, before = in_turn(part, here, y, before)
            else:
                y = act(part, here, y)
        return y


def in_turn(adapter: Adapter, here: Here, y: Tensor, before: Before, owned: bool = False) -> tuple[Tensor, Before]:
    """The output after one more adapter, and what has acted: who changes a weight must know of earlier changes."""
    entry = here.entry(adapter)
    if entry is None:
        return y, before
    return _run(adapter, entry, here, y, owned, before), (*before, (entry, adapter.at(entry)))


def _run(adapter: Adapter, entry: AtSite, here: Here, y: Tensor, owned: bool = False, before: Before = ()) -> Tensor:
    x = here.x(entry)
    if here.picks is None or x is None or isinstance(x, Tensor):
        made: Tensor = entry(x, y, adapter.at(entry), owned=owned, before=before)
        return made
    whole: Tensor = entry(
        x, y.flatten(0, 1), adapter.at(entry), owned=owned, before=before
    )  # a head, which is no product
    return whole.reshape(y.shape[0], -1, *whole.shape[1:])


@dataclass(eq=False, slots=True)
class Mean:
    """`y + sum_i w_i (f_i(y) - y)`; what is added whatever y is goes in with its weight, without the difference."""

    parts: tuple[Node, ...]
    weights: tuple[float, ...]

    def act(self, here: Here, y: Tensor) -> Tensor:
        added: list[tuple[Adapter, AtSite, float]] = []
        total: Tensor | None = None
        for part, weight in zip(self.parts, self.weights, strict=True):
            if isinstance(part, Adapter):
                entry = here.entry(part)
                if entry is None:
                    continue
                if entry.additive:
                    added.append((part, entry, weight))
                    continue
            changed = act(part, here, y)
            if changed is not y:
                total = weight * (changed - y) if total is None else total + weight * (changed - y)
        y = y if total is None else y + total.to(y.dtype)
        for adapter, entry, weight in added:
            y = entry(here.x(entry), y, adapter.at(entry), owned=False, weight=weight)
        return y


@dataclass(frozen=True, eq=False)
class Spans:
    """Parts by token: the i-th on the tokens from bounds[i] to bounds[i + 1] of the sequence."""

    parts: tuple[Node, ...]
    bounds: tuple[int, ...]  # of the parts' starts, from 0
    adapters: tuple[Adapter, ...]

    def act(self, here: Here, y: Tensor) -> Tensor:
        entry = here.first(self.adapters)
        if entry is None:
            return y
        return here.by_row(y, entry.rows, self._act, entry.path)

    def _act(self, here: Here, y: Tensor) -> Tensor:
        """y (rows, tokens, n)."""
        shape = here.shape or Shape(0)
        if y.dim() != 3 or y.shape[1] != shape.tokens:
            raise AdapterError(
                f"a Split acts on (rows, tokens, features), and {tuple(y.shape)} came by row in a batch of "
                f"{shape.tokens} tokens: keep its adapters off such modules with targets=."
            )
        ends = [min(max(bound - shape.before, 0), shape.tokens) for bound in (*self.bounds[1:], 1 << 62)]
        pieces, low = [], 0
        for part, high in zip(self.parts, ends, strict=True):
            if high > low:
                inside = replace(shape, tokens=high - low, before=shape.before + low)
                pieces.append(act(part, replace(here.picking(_tokens(low, high)), shape=inside), y[:, low:high]))
            low = high
        return torch.cat(pieces, 1)


def _tokens(low: int, high: int) -> Pick:
    return lambda x: x[:, low:high]


@dataclass(frozen=True, eq=False)
class Fused:
    """Attention of a trained fusion over what its parts make of the output."""

    adapter: Adapter
    parts: tuple[Node, ...]

    def act(self, here: Here, y: Tensor) -> Tensor:
        entry = here.entry(self.adapter)
        if entry is None:
            return y
        made = tuple(act(part, here, y) for part in self.parts)
        fused: Tensor = entry(made, y, self.adapter.at(entry), owned=False)
        return fused


Node: TypeAlias = Union[Adapter, Chain, Mean, Spans, Fused, "Whole", None]


class Whole(Protocol):
    """Any other node."""

    def act(self, here: Here, y: Tensor) -> Tensor: ...


def act(node: Node, here: Here, y: Tensor) -> Tensor:
    """The output at one place under a node; `y` itself where nothing of it acts there, and never written to."""
    if node is None:
        return y
    if isinstance(node, Adapter):
        entry = here.entry(node)
        return y if entry is None else _run(node, entry, here, y)
    return node.act(here, y)
