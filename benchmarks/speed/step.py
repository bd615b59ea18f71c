"""Measures one case: the fastest setting of TRL is found first, then ours and that one take turns."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from adapters._plan.ledger import Ledger
from benchmarks.measure import cpu_ms, saved_bytes
from benchmarks.speed.cases import Case
from benchmarks.speed.sides import Side, sides
from benchmarks.twins import Setting

TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 0.2)}  # of the loss, of the gradient


@dataclass(frozen=True)
class Measured:
    """Times are CPU seconds of a step, medians; ratios those of the peer's over ours, pair by pair."""

    case: str
    peer: str
    ours: float
    theirs: float
    ratios: tuple[float, ...]
    settable: float
    default: float | None
    floor: float
    losses: tuple[float, float]
    norms: tuple[float, float]
    gradient: float
    saved: tuple[float, float]
    peak: tuple[float, float]
    ops: tuple[int, int]
    head: tuple[int, int]
    profile: dict[str, float]

    @property
    def ratio(self) -> float:
        return median(self.ratios)


def measure(case: Case, setting: Setting, pairs: int, tell: Callable[[str], None]) -> Measured:
    mine, peers, defaults = sides(case, setting)
    for side in (mine, *peers):
        side.step()
    best = min([side for side in peers if side.switched] or peers, key=lambda side: seconds(side.step))
    tell(f"fastest peer: {best.name}")
    losses = (mine.gradients(), best.gradients())
    gradient, norms = _compared(mine, best)
    of_loss, of_gradient = TOLERANCE[case.dtype]
    assert abs(losses[0] - losses[1]) <= of_loss * abs(losses[1]), losses
    assert gradient <= of_gradient, gradient
    times: list[tuple[float, float]] = []
    for i in range(pairs):
        first, second = (mine, best) if i % 2 == 0 else (best, mine)
        one, other = seconds(first.step), seconds(second.step)
        times.append((one, other) if i % 2 == 0 else (other, one))
        tell(f"{times[-1][0]:.2f} s beside {times[-1][1]:.2f} s")
    settable = min((side for side in peers if not side.switched), key=lambda side: seconds(side.step))
    tell(f"fastest peer without the switch: {settable.name}")
    without = median(seconds(settable.step) for _ in range(2))
    default = None
    for side in defaults:
        side.step()
        default = median(seconds(side.step) for _ in range(2))
    both = (mine, best)
    counted = [_counted(side) for side in both]
    return Measured(
        case.name,
        best.name,
        median(ours for ours, _ in times),
        median(theirs for _, theirs in times),
        tuple(theirs / ours for ours, theirs in times),
        without,
        default,
        _floor(counted[0]),
        losses,
        norms,
        gradient,
        _two(saved_bytes(side.gradients, _own(side))[0] for side in both),
        _two(each.peak for each in counted),
        _two(each.operators for each in counted),
        _two(each.rows_of_head(mine) for each in counted),
        _profile(mine),
    )


def _two(values: Any) -> tuple[Any, Any]:
    ours, theirs = values
    return ours, theirs


def _own(side: Side) -> tuple[torch.Tensor, ...]:
    return (*side.model.parameters(), *side.model.buffers())


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    return cpu_ms(run)[0] / 1e3


def _compared(ours: Side, theirs: Side) -> tuple[float, tuple[float, float]]:
    """(the norm of the difference of all gradients over the peer's, the norms)"""
    a, b = ours.by_site(), theirs.by_site()
    assert a.keys() == b.keys(), set(a) ^ set(b)
    both = [torch.cat([found[key].flatten() for key in sorted(a)]) for found in (a, b)]
    norms = (float(both[0].norm()), float(both[1].norm()))
    return float((both[0] - both[1]).norm()) / norms[1], norms


@dataclass(frozen=True)
class _Counted:
    """Of a step: MiB of tensors alive at most, those of the model among them; operators launched; its products."""

    peak: float
    operators: int
    products: Counter[tuple[Any, ...]]

    def rows_of_head(self, side: Side) -> int:
        """Tokens that the output layer computes logits for."""
        words = int(side.model.config.get_text_config().vocab_size)
        return sum(a[0] * count for (a, b, _), count in self.products.items() if b[1] == words)


def _counted(side: Side) -> _Counted:
    side.optimizer.zero_grad()
    gc.collect()
    ledger = Ledger()
    ledger.claim([*_own(side), *(t for state in side.optimizer.state.values() for t in state.values())], "model")
    with ledger, _Counting() as counting:
        side.step()
    return _Counted(sum(ledger.peak.values()) / 2**20, counting.count, counting.products)


def _profile(side: Side) -> dict[str, float]:
    """The operators that take most of a step, with their shares of its CPU time."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        side.step()
    found = recorded.key_averages()
    whole = sum(each.self_cpu_time_total for each in found)
    most = sorted(found, key=lambda each: each.self_cpu_time_total, reverse=True)[:8]
    return {each.key.removeprefix("aten::"): each.self_cpu_time_total / whole for each in most}


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.products: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.products[(tuple(a.shape), tuple(b.shape), a.dtype)] += 1
        return func(*args, **(kwargs or {}))


def _floor(counted: _Counted) -> float:
    """Seconds of the base's own products of the step, one after the other, with nothing between them.

    Those with a weight, in forward and backward, on the tokens of the rows without padding, and the head on labelled
    ones; neither the adapter's (of its rank) nor attention's. A product is taken as the step makes it.
    """
    total = 0.0
    small = 2 * 16
    for (a, b, dtype), count in counted.products.items():
        if min(*a, *b) > small:
            left, right = torch.randn(a, dtype=dtype), torch.randn(b[::-1], dtype=dtype).mT
            total += count * min(seconds(partial(torch.mm, left, right)) for _ in range(4))
    return total
