"""Which adapters make room, where those go that leave the memory, and how they come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from adapters._attach.bank import key_of
from adapters._errors import AdapterError
from adapters._pool.entry import Entry
from adapters._store import read


def who_leaves(
    inside: Sequence[Entry], may_leave: Callable[[Entry], bool], size: int, free: int, rooms: Counter[int]
) -> tuple[list[Entry], int]:
    """The least recently used that have to leave, and the bytes that are free then.

    Args:
        inside: the entries in memory, the least recently used first.
        size: the bytes that are wanted, of which `free` are there.
        rooms: how many rows of each layout there is room for, below 0 where some have to leave; counted up here.
    """
    going = []
    for entry in inside:
        kind = id(entry.layout)
        if may_leave(entry) and (free < size or rooms[kind] < 0):
            going.append(entry)
            free += entry.nbytes
            rooms[kind] += 1
    return going, free


def leave(entry: Entry, entries: Sequence[Entry], ram: int | None) -> None:
    """Out of memory: into RAM if there is room, where others make it, else to disk."""
    row = entry.row()
    assert row is not None, "an attached adapter has its row"
    parked = row.park()
    if ram is not None:
        others = sorted((e for e in entries if e.where == "ram" and e.folder), key=lambda e: e.used)
        free = ram - sum(e.nbytes for e in entries if e.where == "ram")
        while free < entry.nbytes <= ram and others:
            oldest = others.pop(0)
            oldest.where, oldest.parked = "disk", None
            free += oldest.nbytes
        if free < entry.nbytes and entry.folder:
            entry.where, entry.parked = "disk", None
            return
    entry.where, entry.parked = "ram", parked


def bring(entry: Entry, model: nn.Module) -> None:
    """Into memory, from RAM or, checked, from the folder.

    Raises:
        AdapterError: the folder holds another adapter by now, or a damaged one.
    """
    row = entry.row()
    assert row is not None, "an attached adapter has its row"
    row.unpark(entry.parked if entry.parked is not None else _reread(entry, model))
    entry.where, entry.parked = "memory", None


def _reread(entry: Entry, model: nn.Module) -> list[Tensor]:
    bundle = read(entry.folder, model)
    same = entry.layout.key == key_of(bundle.method, bundle.sites, bundle.tensors)
    if not same or bundle.digest != entry.digest:
        raise AdapterError(f"{entry.folder} has changed since {entry.name!r} was added to the pool: add it anew.")
    return entry.layout.joined(bundle.tensors)
