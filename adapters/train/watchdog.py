"""Watches a run while it goes: that every site moves at all, and that everything stays finite.

Cost, on one thread of a CPU with a Llama of 30 layers, 64 wide, LoRA of rank 8 at its 210 sites, steps of 2 rows of 16
tokens: 0.25 ms of a step of 63 ms (0.4 %; 0.8 % with other programs on the machine), the look at all tensors every 25
steps included, and 9 ms for each of the two readings that are compared (tests/test_watchdog.py measures it anew).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from adapters._errors import AdapterError
from adapters._finite import finite
from adapters.train.preflight.places import Place, trained
from adapters.train.preflight.report import count, some

LOG = logging.getLogger("adapters.train")
FEWEST = 2  # steps before which LoRA's A cannot have moved: its gradient is zero while B is


@dataclass(frozen=True)
class Finding:
    """What was seen at an optimizer step; the run went on."""

    step: int
    what: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.what}"


class Watchdog(TrainerCallback):  # type: ignore[misc]
    """A callback for any transformers trainer; in a loop of one's own, `step` after each `optimizer.step()`.

    Sites whose tensors are bit for bit as at the start are named in `findings` and in the log, experts that no token
    was routed to apart from the others. The run ends with an AdapterError when nothing at all has moved, or when loss,
    gradient norm or a tensor is not finite.

    Args:
        model: with an adapter that trains; a trainer gives its own.
        name: the adapter to watch; None watches all that train.
        after: optimizer steps, past the warm-up and with a learning rate above 0, after which everything has moved.
        every: optimizer steps between two looks at the values of all tensors; one tensor is looked at in each.
        warmup_steps: of a loop of one's own; a trainer gives its own.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        name: str | None = None,
        after: int = 10,
        every: int = 25,
        warmup_steps: int = 0,
    ) -> None:
        if after < FEWEST or every < 1:
            raise AdapterError(f"after is {after} and every {every}; they must be at least {FEWEST} and 1 steps.")
        self.name, self.after, self.every, self.warmup = name, after, every, warmup_steps
        self.findings: tuple[Finding, ...] = ()
        if model is not None:
            self._begin(model)

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        learning_rate: float | None = None,
        grad_norm: Tensor | float | None = None,
    ) -> None:
        """To be called after each optimizer step.

        Args:
            loss: of this step.
            learning_rate: of this step; None counts as above 0.
            grad_norm: before clipping.

        Raises:
            AdapterError: something is not finite, or nothing has moved after `after` steps.
        """
        self._count(self._steps + 1, learning_rate)
        self._require_finite(loss, grad_norm)

    def finish(self) -> None:
        """To be called after the last step: compares where the run was shorter than `after` steps.

        Raises:
            AdapterError: nothing has moved, or a tensor is not finite.
        """
        self._require_finite_tensors(self._tensors)
        if self._before is None:
            return
        if self._live < FEWEST:
            self._note(f"the run was too short to tell what moves: {count(self._live, 'step')}")
        else:
            self._compare()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.warmup = args.get_warmup_steps(state.max_steps)
        self._begin(model, state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        rates = [float(group["lr"]) for group in optimizer.param_groups] if optimizer is not None else [1.0]
        self._count(state.global_step + 1, max(rates))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        norm = logs.get("grad_norm")
        if norm is not None and getattr(args, "fp16", False) and not math.isfinite(norm):
            self._note("the gradient overflowed in float16; its scaler skips the step")
            norm = None
        self._require_finite(logs.get("loss"), norm)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.finish()

    def _begin(self, model: nn.Module, step: int = 0) -> None:
        self._places = trained(model, self.name)
        if not self._places:
            raise AdapterError("there is nothing to watch: no adapter of this model trains.")
        self._tensors = [(f"{place.path}:{key}", tensor) for place, key, tensor in _each(self._places)]
        self._before: list[Tensor] | None = [_sums(place, tensor) for place, _, tensor in _each(self._places)]
        self._steps, self._live, self._past = step, 0, 0

    def _count(self, step: int, rate: float | None) -> None:
        self._steps = step
        live = rate is None or rate > 0
        self._live += live
        self._past += live and step > self.warmup
        looks = self._tensors if step % self.every == 0 else [self._tensors[step % len(self._tensors)]]
        self._require_finite_tensors(looks)
        if self._before is not None and self._past >= self.after:
            self._compare()

    def _require_finite(self, loss: Tensor | float | None, grad_norm: Tensor | float | None) -> None:
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            value = float(value.detach() if isinstance(value, Tensor) else value) if value is not None else 0.0
            if math.isfinite(value):
                continue
            bad = [key for key, tensor in self._tensors if not finite(tensor.detach())]
            where = f"not finite are {some(bad)}" if bad else "the adapter's tensors are still finite"
            raise AdapterError(
                f"step {self._steps}: the {what} is {value:g}; {where}. Go back to the last checkpoint with a lower "
                "learning rate or a smaller clip; in float16 use bfloat16 or float32."
            )

    def _require_finite_tensors(self, tensors: list[tuple[str, Tensor]]) -> None:
        if bool(torch.isfinite(get_total_norm([tensor.detach() for _, tensor in tensors]))):
            return
        bad = [key for key, tensor in tensors if not finite(tensor.detach())]  # a norm may overflow by itself
        if bad:
            raise AdapterError(
                f"step {self._steps}: {count(len(bad), 'tensor')} of the adapter not finite: {some(bad)}. Go back to "
                "the last checkpoint with a lower learning rate or a smaller clip."
            )

    def _compare(self) -> None:
        assert self._before is not None, "compared once"
        before, self._before = self._before, None
        after = [_sums(place, tensor) for place, _, tensor in _each(self._places)]
        moved: dict[Place, dict[str, Tensor]] = {place: {} for place in self._places}
        for (place, key, _), old, new in zip(_each(self._places), before, after, strict=True):
            moved[place][key] = (old != new).cpu()
        if not any(bool(each.any()) for found in moved.values() for each in found.values()):
            raise AdapterError(
                f"step {self._steps}: not one of the adapter's {count(len(before), 'tensor')} has changed in "
                f"{count(self._live, 'step')} with a learning rate above 0. Does the optimizer hold them, and does the "
                "loss depend on them? In 16 bits, small steps are rounded away."
            )
        for what in _findings(moved):
            self._note(what)

    def _note(self, what: str) -> None:
        finding = Finding(self._steps, what)
        if what not in {each.what for each in self.findings}:
            self.findings += (finding,)
            LOG.warning("%s", finding)


def _each(places: tuple[Place, ...]) -> Iterator[tuple[Place, str, Tensor]]:
    for place in places:
        for key, tensor in place.tensors.items():
            if tensor.requires_grad:
                yield place, key, tensor


def _sums(place: Place, tensor: Tensor) -> Tensor:
    """A sum of the bits for each expert, `(experts,)`, in which every element has an odd weight of its own.

    A change of one element always shows; of several, they would have to cancel modulo 2 ** 64.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(whole).reshape(place.experts, -1).to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)).sum(1)


def _findings(moved: dict[Place, dict[str, Tensor]]) -> Iterator[str]:
    """What stood still, in sentences: experts apart, which may not have been chosen yet."""
    still: list[str] = []
    idle: list[str] = []
    chosen = {p.site.block for p, found in moved.items() if p.routed and p.site and any(map(torch.any, found.values()))}
    for place, found in moved.items():
        experts = torch.stack(list(found.values())).any(0)
        routed = place.routed and place.site is not None and place.site.block in chosen
        if place.experts > 1 and bool(experts.any()) and not bool(experts.all()):
            idle.append(f"{place.path} {(~experts).nonzero().flatten().tolist()}")
        if not bool(experts.any()):
            (idle if routed else still).append(place.path)
        else:
            still += [f"{place.path}:{key}" for key, each in found.items() if not bool(each.any())]
    if still:
        yield f"{len(still)} have not moved since the start, bit for bit: {some(still)}"
    if idle:
        yield f"experts that have not moved, as no token was routed to them: {some(idle)}"
