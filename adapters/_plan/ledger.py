"""Counts the bytes of all tensors that are alive, op by op, on real tensors as on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "activations"  # what nothing else claims: kept for the backward pass, or on its way


@dataclass
class _Held:
    size: int  # bytes
    group: str
    watch: weakref.ref[Any]  # reports the end of the storage


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, knows every storage that an op made and nobody has let go of; each counts once, however viewed.

    What a kernel takes and gives back within one op is not seen.

    Attributes:
        groups: bytes alive now, by group.
        peak: bytes alive by group when their sum was largest since `start`.
        at: the name of the op that made that peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, _Held] = {}
        self.groups: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """Forgets the peak so far."""
        self.peak: dict[str, int] = dict(self.groups)
        self.at = ""

    def claim(self, tensors: Iterable[Tensor], group: str) -> None:
        """Puts the storages of `tensors` into `group`, also those that no op under this mode has made."""
        for tensor in tensors:
            held = self._note(tensor)
            if held is not None:
                self._add(held.group, -held.size)
                held.group = group
                self._add(group, held.size)

    def settle(self, group: str) -> None:
        """Puts all that nothing claimed into `group`."""
        for held in self._held.values():
            held.group = group if held.group == OTHER else held.group
        self._add(group, self.groups.pop(OTHER, 0))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        if sum(self.groups.values()) > sum(self.peak.values()):
            self.peak, self.at = dict(self.groups), str(func)
        return out

    def _note(self, tensor: Tensor) -> _Held | None:
        if tensor.layout is not torch.strided:  # has no storage of its own
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self._held.get(key)
        if held is None:
            watch = weakref.ref(storage, lambda _: self._free(key))
            held = self._held[key] = _Held(storage.nbytes(), OTHER, watch)
            self._add(OTHER, held.size)
        return held

    def _free(self, key: int) -> None:
        held = self._held.pop(key)
        self._add(held.group, -held.size)

    def _add(self, group: str, size: int) -> None:
        self.groups[group] = self.groups.get(group, 0) + size
