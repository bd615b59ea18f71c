"""Settings under which a step that does not fit would, from the cheapest change to the dearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from adapters._errors import AdapterError
from adapters._plan.report import Proposal, describe
from adapters._plan.step import Batch

Measure: TypeAlias = Callable[[Batch, int], int]  # a batch, and the bits of the base, to bytes
Tried: TypeAlias = tuple[Batch, int, int]  # a batch, the bits of the base, and the bytes they take

LEAST = 64  # tokens of a row, below which no plan goes


def propose(
    batch: Batch, bits: int, peak: int, memory: int, measure: Measure
) -> tuple[tuple[Proposal, ...], tuple[str, ...]]:
    """Each change on its own; where none is enough, one upon the other until they are or nothing is left.

    Args:
        peak: of `batch` with the base in `bits`, in bytes.
        memory: bytes that there are.
        measure: predicts the peak of another batch.

    Returns:
        The proposals, and a sentence for each change that this model cannot take.
    """
    search = _Search(memory, measure, [])
    start = batch, bits, peak
    alone = tuple(search.each(start))
    joined = () if any(each.fits for each in alone) else tuple(search.joined(start))
    return alone + joined, tuple(search.impossible)


@dataclass
class _Search:
    memory: int
    measure: Measure
    impossible: list[str]

    def each(self, start: Tried) -> Iterator[Proposal]:
        for cost, change in self._changes():
            try:
                found = change(*start)
            except AdapterError as error:
                self.impossible.append(str(error))
                continue
            if found != start:
                yield self._proposal(found, cost)

    def joined(self, start: Tried) -> Iterator[Proposal]:
        """Two changes and more: the first ones, then the next upon them."""
        now, costs = start, list[str]()
        for cost, change in self._changes():
            try:
                found = change(*now)
            except AdapterError:  # `each` has said so
                continue
            if found == now:
                continue
            now, costs = found, [*costs, cost]
            if len(costs) > 1:
                yield self._proposal(now, "; ".join(costs))
            if now[2] <= self.memory:
                return

    def _changes(self) -> tuple[tuple[str, Callable[[Batch, int, int], Tried]], ...]:
        return (
            ("the same gradients, in smaller products", self._fewer_rows),
            ("the same gradients, about one more forward", self._checkpointing),
            ("the base is rounded, and unpacked for every product", self._four_bits),
            ("longer rows are cut or left out", self._fewer_tokens),
        )

    def _proposal(self, found: Tried, cost: str) -> Proposal:
        batch, bits, size = found
        return Proposal(describe(batch, bits), cost, batch, bits, size, size <= self.memory)

    def _fewer_rows(self, batch: Batch, bits: int, peak: int) -> Tried:
        """The most rows that fit in a micro-batch, of those that divide the rows there were; else one row."""
        if batch.rows == 1:
            return batch, bits, peak

        def of(rows: int) -> Batch:
            return replace(batch, rows=rows, accumulation=batch.accumulation * batch.rows // rows)

        least = self.measure(of(1), bits)
        slope = (peak - least) / (batch.rows - 1)  # bytes a row: what grows with the rows grows in proportion
        for rows in range(batch.rows - 1, 1, -1):
            if batch.rows % rows == 0 and least + slope * (rows - 1) <= self.memory:
                size = self.measure(of(rows), bits)
                if size <= self.memory:
                    return of(rows), bits, size
        return of(1), bits, least

    def _checkpointing(self, batch: Batch, bits: int, peak: int) -> Tried:
        changed = replace(batch, checkpointing=True)
        return changed, bits, self.measure(changed, bits)

    def _four_bits(self, batch: Batch, bits: int, peak: int) -> Tried:
        return batch, 4, self.measure(batch, 4)

    def _fewer_tokens(self, batch: Batch, bits: int, peak: int) -> Tried:
        """Half the tokens, and again, until they fit or there are too few."""
        while peak > self.memory and batch.tokens >= 2 * LEAST:
            tokens = batch.tokens // 2
            learned = max(1, min(batch.learned * tokens // batch.tokens, tokens - 1))
            batch = replace(batch, tokens=tokens, learned=learned)
            peak = self.measure(batch, bits)
        return batch, bits, peak
