"""Rows of one layout in a table of fixed size, which compiled code reads by number.

torch.compile writes into its guards what it sees of a selection, and compiles anew for every other one, eight times at
most. A number in a tensor is no such thing: adapters that are in tables are chosen, exchanged and mixed in a batch
without compiling again. Number 0 is a row of zeros, which changes nothing: the base.

    y[i] + (x[i] @ right[n_i].T) @ left[n_i].T, n_i the number chosen for row i of the batch, or for all of them
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters._attach.aligned import by_row, put_back
from adapters._attach.bank import Layout, Place, Row
from adapters._errors import AdapterError

SPARE = 8  # slots beside those that were asked for: the zeros, and room for exchanges and for forwards under way


class Table:
    """`slots` rows of a layout, and which are chosen: `chosen` (1,), or (rows,) where rows of a batch differ."""

    def __init__(self, layout: Layout, slots: int) -> None:
        self.layout, self.slots = layout, slots
        with torch.inference_mode(False):
            self.blocks = [
                torch.zeros(slots + SPARE, size, dtype=dtype, device=device)
                for size, (device, dtype) in zip(layout.sizes, layout.blocks, strict=True)
            ]
        self.free = deque(range(1, slots + SPARE))  # the one that was freed first is taken first
        self.taken: dict[int, weakref.finalize[[int], Row]] = {}
        self.lock = threading.Lock()
        self.chosen = torch.zeros(1, dtype=torch.long, device=layout.blocks[0][0])

    def take(self, row: Row) -> int:
        """A free number, which belongs to `row` until that is gone.

        Raises:
            AdapterError: every slot is in use.
        """
        with self.lock:
            if not self.free:
                raise AdapterError(f"all {self.slots} slots are in use: detach an adapter, or make a pool with more.")
            number = self.free.popleft()
        self._watch(row, number)
        return number

    def memory(self, number: int) -> list[Tensor]:
        """The blocks of a slot."""
        return [block[number] for block in self.blocks]

    def _watch(self, row: Row, number: int) -> None:
        self.taken[number] = weakref.finalize(row, self._freed, number)
        self.taken[number].atexit = False

    def adopt(self, row: Row) -> None:
        """Takes a copied row for its own, as the original table has the original."""
        if row.number is not None and row.number not in self.taken:
            self._watch(row, row.number)
            row.blocks = self.memory(row.number)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None, "taken": {}}  # which `adopt` fills

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields, lock=threading.Lock())

    def give(self, number: int) -> None:
        """Frees a number whose row goes elsewhere."""
        self.taken.pop(number).detach()
        self.free.append(number)

    def _freed(self, number: int) -> None:
        self.taken.pop(number, None)
        self.free.append(number)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module.to` and its like do to parameters."""
        with torch.no_grad():
            self.blocks = [change(block).detach() for block in self.blocks]
        self.chosen = self.chosen.to(self.blocks[0].device)

    def at(self, path: str) -> dict[str, Tensor]:
        """The tensors of the chosen rows at a site: (chosen, ...) each."""
        return {name: self._gathered(place) for name, place in self.layout.places[path].items()}

    def _gathered(self, place: Place) -> Tensor:
        part = self.blocks[place.block].narrow(1, place.offset, prod(place.shape))
        return part.index_select(0, self.chosen.to(part.device)).view(-1, *place.shape)


def changed_by_table(tables: Sequence[Table], held: Mapping[str, Any], args: Any, kwargs: Any, y: Any) -> Any:
    """A module's output with what the chosen rows of every table make of it; called in compiled code."""
    for table in tables:
        entry = held.get(table.layout.slot)
        if entry is None:
            continue
        key = None if entry.needs_factors else entry.site.output
        value = y if key is None else y[key]
        made = _changed(table, entry, entry.source(args, kwargs), value)
        y = made if key is None else _put(y, key, made)
    return y


def _put(output: Any, key: Any, made: Tensor) -> Any:
    if isinstance(output, tuple):
        return tuple(made if i == key else item for i, item in enumerate(output))
    output[key] = made
    return output


def _changed(table: Table, entry: Any, x: Tensor | None, y: Tensor) -> Tensor:
    p, rows = table.at(entry.path), table.chosen.shape[0]
    if rows > 1:
        y = by_row(y, entry.rows, rows, entry.path)
        x = None if x is None else by_row(x, entry.rows, rows, entry.path)
    flat = y.reshape(rows, -1, y.shape[-1])
    seen = None if x is None else x.reshape(rows, -1, x.shape[-1])
    low = entry.factors(p)
    if low is None:
        made = entry(seen, flat, p, owned=False)
    else:
        assert seen is not None, "a weight is multiplied with something"
        dropout = float(getattr(entry.method, "dropout", 0.0)) if entry.training else 0.0
        seen = F.dropout(seen, dropout) if dropout else seen
        change = seen.to(y.dtype) @ low.right.to(y.dtype).mT @ low.left.to(y.dtype).mT
        shift = 0 if low.bias is None else low.bias.to(y.dtype).unsqueeze(1)
        made = flat + low.scale * (change + shift)
    made = made.reshape(y.shape)
    return put_back(made, entry.rows).contiguous() if rows > 1 else made


def numbers(tables: Iterable[Table], parts: Sequence[Sequence[Row]]) -> list[Tensor] | None:
    """For each table the numbers of these rows, one an entry of `parts`; None where tables cannot tell them.

    They can where an entry has at most one row of each table, and every row is in one.
    """
    known = {id(table.layout): [0] * len(parts) for table in tables}
    for i, rows in enumerate(parts):
        for row in rows:
            of_table = known.get(id(row.layout))
            if of_table is None or of_table[i] or row.number is None:
                return None
            of_table[i] = row.number
    return [torch.tensor(known[id(table.layout)], device=table.chosen.device) for table in tables]
