"""Tells compiled code what acts, by numbers in tables where that is possible (`adapters._attach.table`)."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from adapters._attach.acting import Chain, Node
from adapters._attach.bank import Layout, Row
from adapters._attach.entries import entries_of
from adapters._attach.per_row import PerRow
from adapters._attach.state import Acting, Adapter, State
from adapters._attach.table import Table, numbers
from adapters._errors import AdapterError


def point(state: State, acting: Acting) -> None:
    """Compiled code sees `acting` from now on: as numbers, if all that acts is in tables."""
    if not state.slots:
        return
    tables = tables_of(state)
    if acting.numbers is None or acting.numbers[0] != (tables, state.moves):
        parts = _rows(acting)
        found = None if parts is None or not tables else numbers(tables, parts)
        if not acting:  # the one selection that every model shares
            _choose(state, tables, found)
            return
        acting.numbers = ((tables, state.moves), found)
    _choose(state, tables, acting.numbers[1])


def _choose(state: State, tables: tuple[Table, ...], found: list[Tensor] | None) -> None:
    for table, chosen in zip(tables, found or (), strict=False):
        table.chosen = chosen
    state.tables = None if found is None else tables


def tables_of(state: State) -> tuple[Table, ...]:
    """The tables of the adapters that are attached, weights' before streams'."""
    layouts = {id(row.layout): row.layout for row in state.rows() if row.layout.table is not None}
    ordered = sorted(layouts.values(), key=lambda layout: layout.key[1][0].kind == "stream")
    return tuple(layout.table for layout in ordered)


def tabled(layout: Layout, entries: list[object]) -> bool:
    """Whether compiled code can compute every change of this layout from stacked tensors."""
    return (
        bool(entries) and all(getattr(entry, "stackable", False) for entry in entries) and not layout.traits.unfollowed
    )


def _rows(acting: Acting) -> list[list[Row]] | None:
    """The rows of what acts, for each entry of a selection by row, or for all rows as one; None where others act."""
    node = acting.node if acting.node is not None else Chain(tuple(acting))
    parts = node.parts if isinstance(node, PerRow) else (node,)
    found = [_of(part) for part in parts]
    alone = isinstance(node, PerRow) and len(parts) == 1  # whose one number would be taken for that of all rows
    lost = alone or acting.separately or any(each is None for each in found)
    return None if lost else found  # type: ignore[return-value]


def _of(node: Node) -> list[Row] | None:
    if node is None:
        return []
    if isinstance(node, Adapter):
        return None if node.row is None or node.row.number is None else [node.row]
    if not isinstance(node, Chain):
        return None
    each = [_of(part) for part in node.parts]
    if any(rows is None for rows in each):
        return None
    rows = [row for some in each for row in some or ()]
    streams = [row for row in rows if row.layout.key[1][0].kind == "stream"]
    return rows if len(streams) < 2 else None  # whose order the tables do not know


def use_tables(model: nn.Module, state: State, slots: int) -> None:
    """Puts the rows of every layout into tables of so many slots, those that are there included.

    Raises:
        AdapterError: more adapters of one kind are attached than there would be slots.
    """
    if state.slots == slots:
        return
    if state.slots:
        raise AdapterError(f"this model's tables have {state.slots} slots already, and {slots} were asked for.")
    kinds = Counter(id(row.layout) for row in state.rows())
    if kinds and max(kinds.values()) > slots:
        raise AdapterError(f"{max(kinds.values())} adapters of one kind are attached, more than the {slots} slots.")
    state.slots = slots
    for row in state.rows():
        layout = row.layout
        if layout.table is None and tabled(layout, entries_of(model, layout.slot)):
            layout.table = Table(layout, slots)
            state.kinds.append(layout)
        if layout.table is not None and row.number is None:
            row.enter()
    point(state, state.active)
