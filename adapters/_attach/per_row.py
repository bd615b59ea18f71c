"""A batch whose rows use different adapters: rows that use the same one are computed together.

Rows are grouped by what acts on them. Where several adapters of one layout act, their tensors are stacked, once a
selection, and one batched product serves all of them (`Bucket`); every other group is computed by itself. A group's
rows are gathered, changed and put back in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach.acting import Here, Node, act
from adapters._attach.batched import Many, add_many, many_of
from adapters._attach.state import Adapter

SEPARATELY = 2  # up to so many adapters of one layout, products by adapter are as fast as a batched one


class Group:
    """Rows, by number, on which one node acts."""

    def __init__(self, node: Node, rows: list[int]) -> None:
        self.node, self.rows = node, rows
        self.index = Index(rows)

    def act(self, here: Here, y: Tensor, whole: bool) -> Tensor:
        """The changed output of these rows, from that of all rows; `whole`: they are all, in their order."""
        if self.node is None:
            return y if whole else self.index.pick(y)
        if whole:
            return act(self.node, here, y)
        return act(self.node, here.picking(self.index.pick), self.index.pick(y))

    def refresh(self) -> None:
        """Called before a forward."""

    def forget(self) -> None:
        """Lets go of copies."""


class Index:
    """Numbers of rows, on whatever device they are asked for."""

    def __init__(self, rows: list[int]) -> None:
        if torch.compiler.is_compiling():
            self.rows = torch.tensor(rows)
        else:
            with torch.inference_mode(False):  # it may be kept for a forward that is trained
                self.rows = torch.tensor(rows)

    def pick(self, x: Tensor) -> Tensor:
        if x.device != self.rows.device:
            return x.index_select(0, self.rows.to(x.device))
        return x.index_select(0, self.rows)


class Bucket(Group):
    """Adapters of one layout, each on `count` rows, where one that has fewer repeats its first and drops the result."""

    def __init__(self, adapters: tuple[Adapter, ...], rows_of: list[list[int]]) -> None:
        self.adapters = adapters
        self.count = max([len(rows) for rows in rows_of])
        padded = [row for rows in rows_of for row in [*rows, *rows[:1] * (self.count - len(rows))]]
        super().__init__(adapters[0], [row for rows in rows_of for row in rows])
        self.padded = Index(padded)
        kept = [i * self.count + k for i, rows in enumerate(rows_of) for k in range(len(rows))]
        self.kept = None if len(kept) == len(padded) else Index(kept)
        self.in_order = padded == list(range(len(kept)))
        self.stacked: dict[tuple[nn.Module, torch.dtype], Many | Mapping[str, Tensor] | None] = {}
        self.versions: tuple[Any, ...] = ()

    def refresh(self) -> None:
        versions = tuple(adapter.row.version for adapter in self.adapters if adapter.row is not None)
        if versions != self.versions:
            self.stacked, self.versions = {}, versions

    def forget(self) -> None:
        self.stacked = {}

    def act(self, here: Here, y: Tensor, whole: bool) -> Tensor:
        entry = here.entry(self.adapters[0])
        if entry is None:
            return y if whole else self.index.pick(y)
        if not (whole and self.in_order):
            here, y = here.picking(self.padded.pick), self.padded.pick(y)
        x = here.x(entry)
        p = self._stacked(entry, y.dtype)
        if p is None:
            made = self._by_adapter(here, y)
        else:
            flat: Any = y.reshape(len(self.adapters), -1, y.shape[-1])
            seen: Any = None if x is None else x.reshape(len(self.adapters), -1, x.shape[-1])
            made = (add_many(flat, seen, p) if isinstance(p, Many) else entry(seen, flat, p, owned=False)).view(y.shape)
        return made if self.kept is None else self.kept.pick(made)

    def _stacked(self, entry: Any, dtype: torch.dtype) -> Many | Mapping[str, Tensor] | None:
        """The tensors of all adapters at a place, with a leading dimension; None where its formula has no such form."""
        if not entry.stackable:
            return None
        if torch.compiler.is_compiling():
            return self._stack(entry, dtype)
        key = (entry, dtype)
        found = self.stacked.get(key)
        if found is None:  # another thread may forget what this one has just stacked
            with torch.inference_mode(False):
                found = self.stacked[key] = self._stack(entry, dtype)
        return found

    def _stack(self, entry: Any, dtype: torch.dtype) -> Many | Mapping[str, Tensor] | None:
        each = [adapter.at(entry) for adapter in self.adapters]
        low = [one for one in [entry.factors(p) for p in each] if one is not None]
        with torch.no_grad():
            if len(low) == len(each):
                return many_of(low, dtype)
            if low or entry.needs_factors:
                return None
            return {name: torch.stack([p[name] for p in each]).to(dtype) for name in each[0]}

    def _by_adapter(self, here: Here, y: Tensor) -> Tensor:
        pieces = []
        for number, adapter in enumerate(self.adapters):
            low, high = number * self.count, (number + 1) * self.count
            part = here.picking(lambda x, low=low, high=high: x[low:high])  # type: ignore[misc]
            pieces.append(act(adapter, part, y[low:high]))
        return torch.cat(pieces)


class PerRow:
    """One node a row: `act` runs the groups and puts their rows back in order."""

    def __init__(self, parts: tuple[Node, ...]) -> None:
        self.parts = parts
        number = dict(zip(dict.fromkeys(parts), count(), strict=False))
        self.distinct, self.which = tuple(number), tuple(map(number.__getitem__, parts))
        self.in_order = list(range(len(parts)))
        self._groups: tuple[Group, ...] | None = None
        self._inverse: Index | None = None
        self._repeated: dict[int, PerRow] = {}
        self.adapters = tuple(dict.fromkeys(chain.from_iterable(map(adapters_in, number))))

    @property
    def groups(self) -> tuple[Group, ...]:
        if torch.compiler.is_compiling():  # which may not fill in what it looks at
            return grouped(self.distinct, self.which)
        if self._groups is None:
            self._groups = grouped(self.distinct, self.which)
        return self._groups

    def act(self, here: Here, y: Tensor) -> Tensor:
        entry = here.first(self.adapters)
        return y if entry is None else here.by_row(y, entry.rows, self._act, entry.path)

    def _act(self, here: Here, y: Tensor) -> Tensor:
        groups = self.groups
        order = [row for group in groups for row in group.rows]
        made = [group.act(here, y, whole=len(groups) == 1) for group in groups]
        whole = made[0] if len(made) == 1 else torch.cat(made)
        if order == self.in_order or (len(groups) == 1 and not isinstance(groups[0], Bucket)):
            return whole
        return self._back(order).pick(whole)

    def _back(self, order: list[int]) -> Index:
        """Where each row is among those of the groups."""
        if torch.compiler.is_compiling():
            return inverse(order)
        if self._inverse is None:
            self._inverse = inverse(order)
        return self._inverse

    def refresh(self) -> None:
        """Called before a forward: what was stacked from tensors that have changed since is forgotten."""
        for group in self.groups:
            group.refresh()

    def forget(self) -> None:
        """Lets go of what was stacked."""
        for group in self.groups:
            group.forget()

    def repeated(self, times: int) -> PerRow:
        """The same with each row repeated so often, as beams are."""
        if times not in self._repeated:
            self._repeated[times] = PerRow(tuple(part for part in self.parts for _ in range(times)))
        return self._repeated[times]


def adapters_in(node: Node) -> tuple[Adapter, ...]:
    """Every adapter under a node."""
    if node is None:
        return ()
    if isinstance(node, Adapter):
        return (node,)
    below: list[Adapter] = []
    for part in getattr(node, "parts", ()):
        below += (part,) if isinstance(part, Adapter) else adapters_in(part)
    own: Adapter | None = getattr(node, "adapter", None)
    return tuple(below) if own is None else (own, *below)


def inverse(order: list[int]) -> Index:
    """Where 0, 1, 2 ... are in an order."""
    found = [0] * len(order)
    for place, row in enumerate(order):
        found[row] = place
    return Index(found)


def grouped(nodes: tuple[Node, ...], which: tuple[int, ...]) -> tuple[Group, ...]:
    """The groups of rows of which row i has the node `which[i]`."""
    rows_of: list[list[int]] = [[] for _ in nodes]
    for row, number in enumerate(which):
        rows_of[number].append(row)
    layouts: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        if isinstance(node, Adapter) and node.row is not None:
            layouts.setdefault(node.slot, []).append(number)
    groups: list[Group] = []
    taken: list[int] = []
    for members in layouts.values():
        some = _of_like_size(members, rows_of)
        if len(some) > SEPARATELY:
            adapters = tuple(node for node in [nodes[number] for number in some] if isinstance(node, Adapter))
            groups.append(Bucket(adapters, [rows_of[number] for number in some]))
            taken += some
    return (*groups, *[Group(node, rows_of[number]) for number, node in enumerate(nodes) if number not in taken])


def _of_like_size(members: list[int], rows_of: list[list[int]]) -> list[int]:
    """Those that padding does not double the work of: who has many rows is computed by itself."""
    some = list(members)
    while some:
        sizes = [len(rows_of[number]) for number in some]
        if len(some) * max(sizes) <= 2 * sum(sizes):
            break
        some.pop(sizes.index(max(sizes)))
    return some
