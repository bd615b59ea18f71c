"""Settings under which a step that does not fit would, from the cheapest change to the dearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from adapters._errors import AdapterError
from adapters._plan.report import Proposal, describe
from adapters._plan.step import Batch

Measure: TypeAlias = Callable[[Batch, int], int]  # a batch, and the bits of the base, to bytes

ROWS = "the same gradients, in smaller products"
RECOMPUTE = "the same gradients, about one more forward"
BITS = "the base is rounded, and unpacked for every product"
TOKENS = "longer rows are cut or left out"
LEAST = 64  # tokens of a row, below which no plan goes


def propose(batch: Batch, bits: int, peak: int, memory: int, measure: Measure) -> tuple[Proposal, ...]:
    """Each change on its own; where none is enough, one upon the other until they are or nothing is left.

    Args:
        peak: of `batch` with the base in `bits`, in bytes.
        memory: bytes that there are.
        measure: predicts the peak of another batch.
    """

    def proposal(changed: Batch, now: int, cost: str, size: int) -> Proposal:
        return Proposal(describe(changed, now), cost, changed, now, size, size <= memory)

    def steps(batch: Batch, bits: int, peak: int) -> Iterator[Proposal]:
        if batch.rows > 1:
            fewer, size = _fewer_rows(batch, peak, memory, lambda other: measure(other, bits))
            yield proposal(fewer, bits, ROWS, size)
        if not batch.checkpointing:
            again = replace(batch, checkpointing=True)
            try:
                yield proposal(again, bits, RECOMPUTE, measure(again, bits))
            except AdapterError:  # a model without it
                pass
        if bits != 4:
            try:
                yield proposal(batch, 4, BITS, measure(batch, 4))
            except AdapterError:  # no bitsandbytes, or nothing to quantise
                pass
        if batch.tokens >= 2 * LEAST:
            shorter, size = _fewer_tokens(batch, memory, lambda other: measure(other, bits))
            yield proposal(shorter, bits, TOKENS, size)

    alone = tuple(steps(batch, bits, peak))
    if any(each.fits for each in alone):
        return alone
    return (*alone, *_together(alone, memory, measure))


def _together(alone: tuple[Proposal, ...], memory: int, measure: Measure) -> Iterator[Proposal]:
    """The changes that were not enough alone, joined in the same order."""
    if len(alone) < 2:
        return
    batch, bits, costs = alone[0].batch, alone[0].bits, [alone[0].cost]
    for each in alone[1:]:
        costs.append(each.cost)
        bits = min(bits, each.bits)
        batch = replace(batch, checkpointing=batch.checkpointing or each.batch.checkpointing)
        if each.cost == TOKENS:
            batch, size = _fewer_tokens(batch, memory, lambda other: measure(other, bits))  # noqa: B023 - called here
        else:
            size = measure(batch, bits)
        yield Proposal(describe(batch, bits), "; ".join(costs), batch, bits, size, size <= memory)
        if size <= memory:
            return


def _fewer_rows(batch: Batch, peak: int, memory: int, measure: Callable[[Batch], int]) -> tuple[Batch, int]:
    """The most rows that fit in a micro-batch, of those that divide the rows there were; else one row."""

    def of(rows: int) -> Batch:
        return replace(batch, rows=rows, accumulation=batch.accumulation * batch.rows // rows)

    least = measure(of(1))
    slope = (peak - least) / (batch.rows - 1)  # bytes a row: everything that grows with rows grows in proportion
    likely = [rows for rows in range(2, batch.rows) if batch.rows % rows == 0 and least + slope * (rows - 1) <= memory]
    for rows in reversed(likely):
        size = measure(of(rows))
        if size <= memory:
            return of(rows), size
    return of(1), least


def _fewer_tokens(batch: Batch, memory: int, measure: Callable[[Batch], int]) -> tuple[Batch, int]:
    """Half the tokens, and again, until they fit or there are too few."""
    while True:
        tokens = batch.tokens // 2
        learned = max(1, min(batch.learned * tokens // batch.tokens, tokens - 1))
        batch = replace(batch, tokens=tokens, learned=learned)
        size = measure(batch)
        if size <= memory or tokens < 2 * LEAST:
            return batch, size
