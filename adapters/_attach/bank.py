"""Where the tensors of frozen adapters are: each adapter's in one row of memory, which its modules only look at.

Adapters of the same method on the same sites share a Layout, and with it one set of modules; each has a Row of its own,
a flat tensor for each device and dtype. Adding one is one copy, whatever the number of sites; one adapter costs its
own bytes, and gives them back when the last who holds it is gone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adapters._contract import Method, Site


@dataclass(frozen=True)
class Place:
    """Where one tensor is in a row: its block, and the elements of it."""

    block: int
    offset: int
    shape: tuple[int, ...]


VIEWED = 64  # rows of a layout that keep views of their tensors: of 420 tensors they take 0.3 MB
Key: TypeAlias = tuple[Method, tuple[Site, ...], tuple[tuple[str, torch.Size, torch.dtype], ...]]


class Layout:
    """What adapters of one kind share: the modules `slot`, and where each tensor is in a row, by site path and name."""

    traits: Any = None  # of every adapter of this layout
    table: Any = None  # where its rows are, if compiled code chooses among them
    watched = False  # whether its modules go with it

    def __init__(self, slot: str, key: Key, devices: Mapping[str, torch.device], tensors: Mapping[str, Tensor]) -> None:
        self.slot, self.key = slot, key
        self.blocks: list[tuple[torch.device, torch.dtype]] = []
        self.places: dict[str, dict[str, Place]] = {}
        self.order: list[list[str]] = []  # of each block, the tensors in it
        sizes: list[int] = []
        # in the order in which a file holds them: rows of further files then need not be put together
        for name, shape, dtype in sorted(key[2], key=lambda each: tensors[each[0]].storage_offset()):
            path, _, tensor = name.rpartition(":")
            kind = (devices[path], dtype)
            if kind not in self.blocks:
                self.blocks.append(kind)
                self.order.append([])
                sizes.append(0)
            block = self.blocks.index(kind)
            self.places.setdefault(path, {})[tensor] = Place(block, sizes[block], tuple(shape))
            self.order[block].append(name)
            sizes[block] += prod(shape)
        self.places = {path: dict(sorted(held.items())) for path, held in self.places.items()}  # as entries have them
        self.sizes = sizes  # of each block, in elements
        self.viewed: deque[weakref.ref[Row]] = deque()  # the rows that keep views, those that began first at the front

    def begin(self, row: Row) -> None:
        """Lets `row` keep views of its tensors, and the first of too many forget theirs."""
        self.viewed.append(weakref.ref(row))
        if len(self.viewed) > VIEWED:  # one out for one in: no other thread can have emptied it
            first = self.viewed.popleft()()
            if first is not None:
                first.forget()

    def joined(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The blocks of a row of these tensors, flat; they are copied, unless they are `Given` and lie so already."""
        owned = isinstance(tensors, Given)
        with torch.no_grad():
            return [_joined([tensors[name] for name in names], owned) for names in self.order]

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return sum(size * dtype.itemsize for size, (_, dtype) in zip(self.sizes, self.blocks, strict=True))

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Where, and as what, rows are from now on."""
        made = [change(torch.empty(0, device=device, dtype=dtype)) for device, dtype in self.blocks]
        self.blocks = [(one.device, one.dtype) for one in made]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watched": False, "viewed": deque()}


class Given(dict[str, Tensor]):
    """Tensors whose memory nobody else holds: a row may keep it."""


def _joined(parts: list[Tensor], owned: bool) -> Tensor:
    """The tensors, flat, one after the other: a copy, unless they are owned and lie so already."""
    first = parts[0]
    size, end = first.element_size(), first.data_ptr()
    for part in parts if owned and not first.is_inference() else ():
        if part.data_ptr() != end or not part.is_contiguous():
            break
        end += part.nbytes
    else:
        count, offset = (end - first.data_ptr()) // size, first.storage_offset()
        # of one memory, then, and not of neighbours
        if count and (offset + count) * size <= first.untyped_storage().nbytes():
            return first.detach().as_strided((count,), (1,), offset)
    return torch.cat([part.detach().reshape(-1) for part in parts])


class Row:
    """One adapter's tensors, in one flat tensor for each block of its layout."""

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self.number: int | None = None  # in the layout's table, if it has one
        self.keeper: Any = None  # the pool that may take its memory away for a while
        self.away = False
        self.readers = 0  # forwards that read it in a table
        self.left: int | None = None  # the slot that it has left, which some of them may still read
        self._views: dict[str, dict[str, Tensor]] = {}
        with torch.inference_mode(False), torch.no_grad():
            self._fill(layout.joined(tensors))

    def _fill(self, blocks: list[Tensor]) -> None:
        """Takes these blocks for its own, on their devices, or writes them into a slot of the layout's table."""
        with torch.inference_mode(False), torch.no_grad():
            made = [block.to(*kind) for block, kind in zip(blocks, self.layout.blocks, strict=True)]
            table = self.layout.table
            if table is not None and self.left is not None:  # as it was, for nobody else may have written there
                self.number, self.left = self.left, None
                made = table.memory(self.number)
            elif table is not None:
                self.number = table.take(self)
                memory = table.memory(self.number)
                for place, block in zip(memory, made, strict=True):
                    place.data.copy_(block)  # by its data: other slots of the memory keep their version
                made = memory
        self.blocks, self._views, self.away = made, {}, False

    def at(self, path: str) -> dict[str, Tensor]:
        """The tensors at one site, by name: views of the row."""
        if torch.compiler.is_compiling():  # what fills up as it is used would be compiled anew
            return {name: _view(self.blocks, place) for name, place in self.layout.places[path].items()}
        views = self._views  # taken first: what is made of blocks that another thread parks goes into those it drops
        found = views.get(path)
        if found is None:
            blocks = self.blocks
            while not blocks:
                self.keeper.bring(self)
                blocks = self.blocks
            found = {name: _view(blocks, place) for name, place in self.layout.places[path].items()}
            if not views:
                self.layout.begin(self)
            views[path] = found
        return found

    def forget(self) -> None:
        """Drops the views; they are made again as they are asked for."""
        self._views = {}

    @property
    def version(self) -> tuple[int, ...]:
        """Changes whenever a tensor was written to, or moved."""
        return tuple(value for block in self.blocks for value in (id(block), block._version))

    def enter(self) -> None:
        """Moves into a free slot of the layout's new table."""
        self._fill(self.blocks)

    def park(self) -> list[Tensor]:
        """Gives the memory back, and the blocks in RAM; whoever is reading keeps what it has."""
        blocks, self.blocks, self._views, self.away = self.blocks, [], {}, True
        if self.number is None:
            return [block.cpu() for block in blocks]
        copies = [block.to("cpu", copy=True) for block in blocks]
        self.left = self.number
        self.give_back()
        return copies

    def give_back(self) -> None:
        """Frees the slot that it has left, once nobody reads it."""
        if not self.readers and self.left is not None:
            self.layout.table.give(self.left)
            self.left = None

    def unpark(self, blocks: list[Tensor]) -> None:
        """The inverse of `park`."""
        self._fill(blocks)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module.to` and its like do to parameters, if it is not away; when it comes back, it follows."""
        if self.away:
            return
        if self.number is not None:
            self.blocks = self.layout.table.memory(self.number)
        else:
            with torch.no_grad():
                self.blocks = [change(block).detach() for block in self.blocks]
        self._views = {}

    def __getstate__(self) -> dict[str, Any]:
        if self.away:
            self.keeper.bring(self)
        return {
            **self.__dict__,
            "_views": {},
            "keeper": None,
            "readers": 0,
            "left": None,
        }  # a copy makes its own, and is in no pool


def _view(blocks: list[Tensor], place: Place) -> Tensor:
    return blocks[place.block].narrow(0, place.offset, prod(place.shape)).view(place.shape)


def key_of(method: Method, sites: tuple[Site, ...], tensors: Mapping[str, Tensor]) -> Key:
    """What makes two adapters of one layout."""
    return method, sites, tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(tensors.items()))
