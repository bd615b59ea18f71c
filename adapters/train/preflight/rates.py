"""Whether learning rate, warm-up, schedule and precision can train this kind of adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters._contract import WeightMethod
from adapters.train.preflight.places import Place
from adapters.train.preflight.report import Check, count, failed, ok, some, warning

Schedule = str | Sequence[float] | Callable[[int], float]
IDLE = 0.1  # share of the steps that a schedule may waste at 0
LONG = 0.5  # share of the steps that a warm-up may take


@dataclass(frozen=True)
class Range:
    """Learning rates of Adam that train a kind of adapter, and what is usual."""

    what: str
    least: float
    most: float
    usual: str


# 2e-4 and 4e-4 to 5e-4: LoRA, arXiv 2106.09685, tables 9, 11, 12; 1e-4 to 2e-4: QLoRA, arXiv 2305.14314, table 9;
# 1e-3 taught a small model a format in 45 steps (recipes/quickstart.yaml)
LOW_RANK = Range("a change of weights", 1e-5, 5e-3, "1e-4 to 1e-3")
# 3e-3: T-Few, arXiv 2205.05638
VECTORS = Range("a scaling of activations", 1e-4, 5e-2, "1e-3 to 1e-2")
# 3e-5, 3e-4 and 3e-3 were searched by Houlsby et al., arXiv 1902.00751
STREAM = Range("a bottleneck", 1e-5, 1e-2, "1e-4 to 1e-3")
# without the reparametrisation of Li and Liang the tensors are of the size of activations, and need larger steps: 7e-3
# in run_script/run_boolq_roberta.sh of THUDM/P-tuning-v2, 1e-2 in recipes/quickstart.yaml
PREFIX = Range("a prefix", 1e-3, 1e-1, "5e-3 to 2e-2")
RANGES = {"weight": LOW_RANK, "stream": STREAM, "keyvalue": PREFIX}


def range_of(places: Sequence[Place]) -> Range | None:
    """What rate these tensors take, by kind; None where the kind is not known."""
    sites = [place for place in places if place.site is not None]
    if not sites:
        return None
    known = RANGES.get(sites[0].adapter.method.kind)
    return VECTORS if known is LOW_RANK and all(map(_is_vector, sites)) else known


def _is_vector(place: Place) -> bool:
    method = place.adapter.method
    low = method.at(place.site).factors(place.tensors) if isinstance(method, WeightMethod) and place.site else None
    sizes = [(tensor.numel() // place.experts, max(tensor.shape)) for tensor in place.tensors.values()]
    return low is None and all(size == longest for size, longest in sizes)


def rate_checks(
    places: Sequence[Place], rate: float | None, warmup: float | None, total: int | None, schedule: Schedule | None
) -> list[Check]:
    checks = [_rate(places, rate)] if rate is not None else []
    if total is not None and total <= 0:
        remedy = "check epochs, rows and batch size, or set max_steps"
        return [*checks, failed(f"the run has {total} steps: nothing would be trained", remedy)]
    if total is not None and warmup is not None:
        checks.append(_warmup(warmup, total))
    if total is not None and schedule is not None:
        checks += _schedule(schedule, total)
    return [*checks, *(_resolution(places, rate) if rate else [])]


def _rate(places: Sequence[Place], rate: float) -> Check:
    if not math.isfinite(rate) or rate <= 0:
        return failed(f"the learning rate is {rate:g}", "set a learning rate above 0")
    fits = range_of(places)
    if fits is None:
        return ok(f"learning rate {rate:g} (no range is known for this kind of adapter)")
    if fits.least <= rate <= fits.most:
        return ok(f"learning rate {rate:g}, within {fits.least:g} to {fits.most:g} for {fits.what}")
    far = "high" if rate > fits.most else "low"
    what = f"the learning rate {rate:g} is {far} for {fits.what}: {fits.least:g} to {fits.most:g} trains one"
    return warning(what, f"usual with Adam: {fits.usual}; other optimizers may want other rates")


def _warmup(warmup: float, total: int) -> Check:
    steps = math.ceil(warmup * total) if 0 < warmup < 1 else int(warmup)  # below 1 it is a share, as in transformers
    if steps >= total:
        what = f"the warm-up takes {count(steps, 'step')} of {total:,}: the learning rate never arrives"
        return failed(what, f"warm up for a tenth of the run, {max(1, total // 10)} steps, or train longer")
    if steps > LONG * total:
        return warning(f"the warm-up takes {steps:,} of {count(total, 'step')}", "a tenth of the run is usual")
    return ok(f"warm-up of {steps:,} of {count(total, 'step')}")


def _schedule(schedule: Schedule, total: int) -> list[Check]:
    """Schedules by name are made for the run's length; one that was made by hand may be for another."""
    if isinstance(schedule, str):
        return [ok(f"schedule {schedule}, made for the run's {count(total, 'step')}")]
    if callable(schedule):
        factors = [float(schedule(step)) for step in range(total)]
    else:
        factors = [float(factor) for factor in schedule[:total]]
        if len(factors) < total:
            what = f"the schedule has {count(len(factors), 'value')} for {count(total, 'step')}"
            return [failed(what, "make the schedule for the run's number of steps")]
    last = max((step for step, factor in enumerate(factors) if factor > 0), default=-1)
    idle = total - 1 - last
    if last < 0:
        return [failed("the schedule is 0 at every step", "make a schedule that starts above 0")]
    if idle > max(1, IDLE * total):
        what = f"the schedule is 0 from step {last + 1:,} on: {idle:,} of {count(total, 'step')} train nothing"
        return [warning(what, "make the schedule for the run's number of steps")]
    return [ok(f"the schedule is above 0 for {last + 1:,} of {count(total, 'step')}")]


def _resolution(places: Sequence[Place], rate: float) -> list[Check]:
    """Adam moves a value by about the learning rate; 16 bits round that away where it is below half a spacing."""
    tensors = [(f"{p.path}:{name}", t) for p in places for name, t in p.tensors.items() if t.requires_grad]
    coarse = [(key, t.detach()) for key, t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
    stuck = [key for key, t in coarse if _unmoved(t, rate) > 0.5]
    if not stuck:
        return []
    kind = str(next(t.dtype for _, t in coarse)).removeprefix("torch.")
    what = f"steps of {rate:g} are rounded away in most of {count(len(stuck), f'{kind} tensor')}: {some(stuck)}"
    return [warning(what, "train in float32 (attach's default), or with a larger learning rate")]


def _unmoved(tensor: torch.Tensor, rate: float) -> float:
    """The share of the values other than 0 that neither `+ rate` nor `- rate` changes."""
    wide, live = tensor.float(), tensor != 0
    same = ((wide + rate).to(tensor.dtype) == tensor) & ((wide - rate).to(tensor.dtype) == tensor)
    return float((same & live).sum() / live.sum().clamp(min=1))
