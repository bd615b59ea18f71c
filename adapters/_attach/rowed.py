"""Prepares an adapter's modules and tensors, and lets go of them: with parameters of its own, or with a row of memory.

Adapters of one kind whose tensors are in rows share their modules: the first makes them, and the last takes them along.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from adapters._attach.bank import Layout, Row, key_of
from adapters._attach.compiled import tabled
from adapters._attach.container import Entry
from adapters._attach.entries import Made, device_of, drop_slot, make_entries
from adapters._attach.state import Adapter, State
from adapters._attach.table import Table
from adapters._attach.traits import traits_of


def prepared(
    model: nn.Module, state: State, adapter: Adapter, tensors: Mapping[str, Tensor], banked: bool
) -> tuple[Adapter, list[Made]]:
    """The adapter with its slot and its row, if it has one, and what is to be placed; the model does not change."""
    if not banked or adapter.trainable or adapter.head or adapter.tokens is not None:
        adapter = dataclasses.replace(adapter, slot=state.new_slot(), row=None)
        made = make_entries(model, adapter, tensors)
        return dataclasses.replace(adapter, traits=_traits(adapter, made)), made
    key = key_of(adapter.method, adapter.sites, tensors)
    for each in [each for each in state.layouts.values() if not each.watched]:  # those of a copied model
        _watch(model, each)
    layout = state.layouts.get(key)
    if layout is not None:
        return dataclasses.replace(adapter, slot=layout.slot, row=Row(layout, tensors), traits=layout.traits), []
    adapter = dataclasses.replace(adapter, slot=state.new_slot())
    made = make_entries(model, adapter, tensors)
    layout = Layout(adapter.slot, key, {site.path: device_of(model, site) for site in adapter.sites}, tensors)
    layout.traits = _traits(adapter, made)
    if state.slots and tabled(layout, [change.entry for change in made if change.entry is not None]):
        layout.table = Table(layout, state.slots)
        state.kinds.append(layout)
    row = Row(layout, tensors)
    for change in made:
        if isinstance(change.entry, Entry):
            change.entry._parameters.clear()
    _watch(model, layout)
    state.layouts[key] = layout
    return dataclasses.replace(adapter, row=row, traits=layout.traits), made


def release(model: nn.Module, state: State, adapter: Adapter, others: Iterable[Adapter]) -> None:
    """Takes an adapter's modules out, unless others share them."""
    if adapter.row is None:
        drop_slot(model, adapter.slot)
        return
    rows = [other.row for other in others if other.row is not None and other is not adapter]
    kept = rows and adapter.row.layout in state.kinds  # a kind that returns is found by compiled code as it was
    if not kept and not any(row.layout is adapter.row.layout for row in rows):
        state.layouts.pop(adapter.row.layout.key, None)
        state.kinds = [layout for layout in state.kinds if layout is not adapter.row.layout]
        drop_slot(model, adapter.slot)


def _watch(model: nn.Module, layout: Layout) -> None:
    """A swap may replace the last adapter of a kind while someone still runs it: its modules go with the layout."""
    weakref.finalize(layout, _drop_slot, weakref.ref(model), layout.slot).atexit = False
    layout.watched = True


def _traits(adapter: Adapter, made: Iterable[Made]) -> object:
    entries = [change.entry for change in made if change.entry is not None]
    return traits_of(adapter.method, adapter.sites, entries, bool(adapter.head), adapter.tokens is not None)


def _drop_slot(model: weakref.ref[nn.Module], slot: str) -> None:
    alive = model()
    if alive is not None:
        drop_slot(alive, slot)
