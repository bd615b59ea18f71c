"""Measures one row: two sides in interleaved pairs, one thread, with what each side computed held against the other.

Measured is the processor time of this process (`time.process_time`), which other processes on the machine disturb
less than wall time; where a side waits for a disk, wall time. Warm-up rounds, what prepares a round, what checks it
and the garbage collector lie outside the measurement.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.result import LIMIT, Line

Unit = Literal["CPU ms", "wall ms", "saved MiB", "import ms", "own ms", "ratio", "MiB"]
OWN: tuple[Unit, ...] = ("import ms", "own ms", "ratio", "MiB")  # what `run` measures itself and returns


def _nothing(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Side:
    """One of the two programs of a row. Only `run` is measured.

    Args:
        run: the work.
        before: makes the state that `run` needs.
        after: takes what `run` returned, undoes it, and returns what is compared with the other side.
        own: tensors that exist anyway (parameters), which are not counted as saved for backward.
    """

    run: Callable[[], Any]
    before: Callable[[], Any] = _nothing
    after: Callable[[Any], Any] = lambda result: result
    own: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Both sides of a row and the check, which raises AssertionError when they did not do the same."""

    ours: Side
    theirs: Side | None = None
    agree: Callable[[Any, Any], None] = _nothing


@dataclass(frozen=True)
class Row:
    """One comparison. `gated`: ours may take at most `limit` times the peer's, `LIMIT` where both do the same work."""

    name: str
    build: Callable[[Any], Pair]
    peer: str = "PEFT"
    gated: bool = True
    limit: float = LIMIT
    units: tuple[Unit, ...] = ("CPU ms",)
    most_pairs: int = 1000
    calls: int = 1  # of each side in one measurement, where a single call is too short to be timed
    needs: tuple[str, ...] = field(default=())  # packages without which the row is left out
    warm: bool = True  # one round before those that count


def measure_row(row: Row, setting: Any, pairs: int, tick: Callable[[], None] = _nothing) -> list[Line]:
    """Builds a row, warms both sides up, and measures it in each of its units."""
    gc.collect()
    pair = row.build(setting)
    lines = []
    for unit in row.units:
        if row.warm and unit in ("CPU ms", "wall ms"):  # bytes do not depend on warmth, and a new process is cold
            _round(pair, unit, row.calls, ours_first=True)
        count = 1 if unit == "saved MiB" else min(pairs, row.most_pairs)
        values = []
        for i in range(count):
            values.append(_round(pair, unit, row.calls, ours_first=i % 2 == 0))
            tick()
        theirs = tuple(value for _, value in values if value is not None)
        gated = row.gated and bool(theirs)
        lines.append(Line(row.name, unit, tuple(value for value, _ in values), theirs, row.peer, gated, row.limit))
    return lines


def _round(pair: Pair, unit: Unit, calls: int, ours_first: bool) -> tuple[float, float | None]:
    """One value a side. The sides take turns in going first, so that a drift of the machine favours neither."""
    if pair.theirs is None:
        return _once(pair.ours, unit, calls)[0], None
    order = (pair.ours, pair.theirs) if ours_first else (pair.theirs, pair.ours)
    first, second = (_once(side, unit, calls) for side in order)
    (ours, ours_result), (theirs, theirs_result) = (first, second) if ours_first else (second, first)
    pair.agree(ours_result, theirs_result)
    return ours, theirs


def _once(side: Side, unit: Unit, calls: int) -> tuple[float, Any]:
    side.before()
    gc.collect()
    gc.disable()
    try:
        if unit == "saved MiB":
            value, result = saved_bytes(side.run, side.own)
        elif unit in OWN:
            value = result = float(side.run())
        else:
            clock = time.process_time if unit == "CPU ms" else time.perf_counter
            start = clock()
            for _ in range(calls):
                result = side.run()
            value = (clock() - start) * 1e3 / calls
    finally:
        gc.enable()
    return value, side.after(result)


def cpu_ms(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU milliseconds of one call, for rows that measure themselves."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        result = run()
        return (time.process_time() - start) * 1e3, result
    finally:
        gc.enable()


def saved_bytes(run: Callable[[], Any], own: tuple[Tensor, ...]) -> tuple[float, Any]:
    """MiB that autograd keeps for the backward pass of `run`: each storage once, the tensors of `own` not at all."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(found.values()) / 2**20, result
