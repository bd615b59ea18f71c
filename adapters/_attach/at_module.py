"""What the acting adapters do at one module: to its output, to its input, and to a parameter that is read from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach.acting import UNKNOWN_ROWS, Before, Chain, Here, Mean, Node, Shape
from adapters._attach.aligned import by_row, put_back
from adapters._attach.batches import Repeated
from adapters._attach.called import CalledWeight, ReadWeight, ScaledInput
from adapters._attach.container import Replica, put
from adapters._attach.factored import Factored
from adapters._attach.per_row import PerRow
from adapters._attach.revised import NewRows, Stored, rows_key
from adapters._attach.state import SHAPE, Acting, Adapter, State, drop_tap, notes
from adapters._attach.streamed import Fusion, Stream
from adapters._errors import AdapterError
from adapters._fourbit import Packed, as_dense

AFTER = (CalledWeight, Stream, Fusion, Replica)  # entries that are called after their module
Held = Mapping[str, nn.Module | None]


def changed(
    state: State, acting: Acting, held: Held, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """A module's output with what the acting adapters make of it."""
    entries: list[tuple[Adapter, Any]] = []
    for adapter in acting:
        entry = held.get(adapter.slot)
        if isinstance(entry, AFTER):
            entries.append((adapter, entry))
    if not entries:
        return output
    streams = [pair for pair in entries if isinstance(pair[1], Stream | Fusion)]
    key = streams[0][1].site.output if streams else None
    y = output if key is None else output[key]
    weights = entries if not streams else [pair for pair in entries if pair not in streams]
    shape = _shape(state, acting.node)
    for some in (weights, streams):  # what a branch returns is made by its weights, whatever the order of adapters
        if acting.node is not None and some:
            y = acting.node.act(Here({a.slot: entry for a, entry in some}, args, kwargs, shape), y)
            continue
        before: Before = ()
        for adapter, entry in some:
            p = adapter.at(entry)
            y = entry(entry.source(args, kwargs), y, p, before=before)
            before = (*before, (entry, p))
    for _, entry in streams:
        if isinstance(entry, Stream) and entry.tap is not None:
            drop_tap(entry.tap)
    return put(output, key, y)


def _shape(state: State, node: Node) -> Shape | None:
    if torch.compiler.is_compiling():
        return Shape(len(node.parts)) if isinstance(node, PerRow) else None
    found: Shape | None = notes(state).get(SHAPE)
    return found


def scaled_arguments(
    state: State, acting: Acting, held: Held, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with the first scaled by the adapters that scale the inputs of its product."""
    entries: dict[str, ScaledInput] = {}
    for adapter in acting:
        entry = held.get(adapter.slot)
        if isinstance(entry, ScaledInput):
            entries[adapter.slot] = entry
    if not entries:
        return args, kwargs
    node = acting.node if acting.node is not None else Chain(tuple(acting))
    if isinstance(node, Repeated):
        raise AdapterError(UNKNOWN_ROWS)
    name, x = (None, args[0]) if args else next(iter(kwargs.items()))
    if isinstance(node, PerRow):
        here = Here(held, args, kwargs, _shape(state, node))
        x = _scaled_rows(node, entries, here, x)
    else:
        scales = _scales(node, entries)
        x = x if scales is None else (x * scales).to(x.dtype)
    return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})


def _scales(node: Node, entries: Mapping[str, ScaledInput]) -> Tensor | None:
    """(n_in): the product of a chain's, `1 + sum_i w_i (s_i - 1)` of a mean's; None for none."""
    if isinstance(node, Adapter):
        entry = entries.get(node.slot)
        found: Tensor | None = None if entry is None else entry(node.at(entry))
        return found
    total: Tensor | None = None
    if isinstance(node, Chain):
        for scales in (_scales(part, entries) for part in node.parts):
            total = scales if total is None else total if scales is None else total * scales
    elif isinstance(node, Mean):
        for part, weight in zip(node.parts, node.weights, strict=True):
            scales = _scales(part, entries)
            if scales is not None:
                total = (1 if total is None else total) + weight * (scales - 1)
    return total


def _scaled_rows(node: PerRow, entries: Mapping[str, ScaledInput], here: Here, x: Tensor) -> Tensor:
    one = next(iter(entries.values()))
    if here.shape is None:
        raise AdapterError(UNKNOWN_ROWS)
    rows = by_row(x, one.rows, here.shape.rows, one.path)
    ones = torch.ones(x.shape[-1], device=x.device)
    each = torch.stack([ones if (s := _scales(part, entries)) is None else s for part in node.parts])
    scaled = rows * each.view(rows.shape[0], *[1] * (rows.dim() - 2), -1)
    return put_back(scaled.to(x.dtype), one.rows)


def read_under(acting: Acting, held: Held, parameter: str, stored: Stored, raw: Any) -> Stored:
    """What stands for a parameter that is read, under the acting adapters."""
    node = acting.node if acting.node is not None else Chain(tuple(acting))
    if isinstance(node, PerRow | Repeated):
        keys = [key for a in acting for key in (f"{a.slot}-{parameter}", rows_key(a.slot, parameter))]
        if any(key in held for key in keys):
            raise AdapterError(UNKNOWN_ROWS)
    return _read(node, held, parameter, stored, raw)


def _read(node: Node, held: Held, parameter: str, stored: Stored, raw: Any) -> Stored:
    if isinstance(node, Adapter):
        entry, rows = held.get(f"{node.slot}-{parameter}"), held.get(rows_key(node.slot, parameter))
        if isinstance(entry, ReadWeight):
            stored = entry(stored, node.at(entry))
        return rows(stored, raw) if isinstance(rows, NewRows) else stored
    if isinstance(node, Chain):
        for part in node.parts:
            stored = _read(part, held, parameter, stored, raw)
        return stored
    if isinstance(node, Mean):
        return _averaged(node, held, parameter, stored, raw)
    return stored  # of anything else no adapter acts on what is read: it would have been refused


def _averaged(node: Mean, held: Held, parameter: str, stored: Stored, raw: Any) -> Stored:
    """`W + sum_i w_i (f_i(W) - W)`: one product of all factors where each part is one, else formed densely."""
    each = [(w, _read(part, held, parameter, stored, raw)) for part, w in zip(node.parts, node.weights, strict=True)]
    each = [(weight, made) for weight, made in each if made is not stored]
    if not each:
        return stored
    factored = [(weight, made) for weight, made in each if isinstance(made, Factored) and made.base is stored]
    if len(factored) == len(each) and len({made.dropout for _, made in factored}) == 1:
        left = torch.cat([weight * made.scale * made.left for weight, made in factored], -1)
        right = torch.cat([made.right for _, made in factored], -2)
        return Factored(stored, left, right, 1.0, factored[0][1].dropout)  # type: ignore[arg-type]
    base = _dense(stored)
    return base + sum(weight * (_dense(made) - base) for weight, made in each)


def _dense(stored: Stored) -> Tensor:
    return as_dense(stored) if isinstance(stored, Tensor | Packed) else stored.dense("an average")
