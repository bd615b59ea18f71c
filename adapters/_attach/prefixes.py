"""The prefixes that act at one attention, put together: one for the whole batch, or one for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters._attach.acting import Chain, Mean, Node
from adapters._attach.container import KeyValue
from adapters._attach.per_row import PerRow
from adapters._attach.state import Adapter
from adapters._contract import Rows


@dataclass(frozen=True)
class Prefixes:
    """keys, values (heads, length, dim), or (rows, heads, length, dim), some hidden by `visible` (rows, length)."""

    keys: Tensor
    values: Tensor
    visible: Tensor | None = None
    rows: Rows | None = None  # of the attention's batch

    def for_batch(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, length, dim) for an attention whose keys are `k`."""
        if self.keys.dim() == 3:
            keys, values = (part.to(k.dtype)[None].expand(k.shape[0], -1, -1, -1) for part in (self.keys, self.values))
            return keys, values
        return self._spread(self.keys.to(k.dtype), k), self._spread(self.values.to(k.dtype), k)

    def hidden(self, k: Tensor) -> Tensor | None:
        """(batch, length): where a row has no prefix."""
        return None if self.visible is None else ~self._spread(self.visible, k)

    def _spread(self, x: Tensor, k: Tensor) -> Tensor:
        """By row of the batch to by row of the attention, which may have several for one: windows, say."""
        times = k.shape[0] // x.shape[0]
        if times == 1:
            return x
        if self.rows is not None and self.rows.layout == "interleaved":
            return x.repeat(times, *[1] * (x.dim() - 1))
        return x.repeat_interleave(times, 0)


def prefixes_of(node: Node, entries: Mapping[str, KeyValue]) -> Prefixes | None:
    """What stands before the keys under a node, for those adapters that have an entry here."""
    if isinstance(node, PerRow):
        return _by_row(node, entries)
    found = _of(node, entries)
    return None if found is None else Prefixes(*found)


def _of(node: Node, entries: Mapping[str, KeyValue]) -> tuple[Tensor, Tensor] | None:
    """[P_a; P_b] of a chain, sum_i w_i P_i of a mean."""
    if isinstance(node, Adapter):
        entry = entries.get(node.slot)
        held: tuple[Tensor, Tensor] | None = None if entry is None else entry(node.at(entry))
        return held
    if isinstance(node, Chain):
        parts = [each for each in (_of(part, entries) for part in node.parts) if each is not None]
        if len(parts) < 2:
            return parts[0] if parts else None
        return torch.cat([k for k, _ in parts], -2), torch.cat([v for _, v in parts], -2)
    if isinstance(node, Mean):
        weighted = [
            (weight, each)
            for part, weight in zip(node.parts, node.weights, strict=True)
            if (each := _of(part, entries)) is not None
        ]
        if not weighted:
            return None
        keys, values = ([weight * each[i] for weight, each in weighted] for i in (0, 1))
        return torch.stack(keys).sum(0), torch.stack(values).sum(0)
    return None


def _by_row(node: PerRow, entries: Mapping[str, KeyValue]) -> Prefixes | None:
    """A prefix for each row, right-aligned to the longest; what stands before a shorter one is hidden."""
    made = [_of(part, entries) for part in node.distinct]
    held = [each for each in made if each is not None]
    if not held:
        return None
    one = next(iter(entries.values()))
    longest = max(k.shape[-2] for k, _ in held)
    lengths = [0 if each is None else each[0].shape[-2] for each in made]
    keys, values = (torch.stack([_padded(each, i, longest, held[0][i]) for each in made]) for i in (0, 1))
    which = torch.tensor(node.which, device=keys.device)
    keys, values, lengths = keys[which], values[which], [lengths[i] for i in node.which]
    if all(length == longest for length in lengths):
        return Prefixes(keys, values, None, one.rows)
    visible = torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
    return Prefixes(keys, values, visible.to(keys.device), one.rows)


def _padded(pair: tuple[Tensor, Tensor] | None, which: int, length: int, like: Tensor) -> Tensor:
    if pair is None:
        return like.new_zeros(*like.shape[:-2], length, like.shape[-1])
    return F.pad(pair[which], (0, 0, length - pair[which].shape[-2], 0))
