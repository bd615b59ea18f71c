"""Whether every tensor that should train gets a gradient: tried on the first batches, with shaken tensors.

Shaken, because a fresh adapter says nothing: LoRA's A has no gradient while B is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapters.train.preflight.places import Place
from adapters.train.preflight.report import Check, count, failed, ok, some, warning
from adapters.train.preflight.undisturbed import shaken

Loss = Callable[[Any, Mapping[str, Any]], Tensor]
# noise against the tensor itself; again where something got none: a ReLU may be dead by chance, 16 bits may overflow
ATTEMPTS = ((0.02, 11), (0.002, 12), (0.1, 13))

NEVER = "the forward never reaches the site"
CUT = "the forward reaches the site, and its output does not reach the loss"
ZERO = "the gradient is zero in every element"
BAD = "the gradient is not finite"
FROZEN = "it is frozen"
REMEDY = {
    NEVER: "attach where these batches go through (`targets`), or leave the site out",
    CUT: "look for a detach(), a torch.no_grad() or an .item() between the site and the loss",
    ZERO: "something multiplies what the site does by zero: a mask, a dead gate, a loss that does not depend on it",
    BAD: "lower the learning rate or the adapter's scale, or train in float32 or bfloat16 instead of float16",
    FROZEN: "set requires_grad on all tensors of the adapter, or load it with trainable=True",
}


@dataclass
class Seen:
    """What the backward passes left at one place."""

    called: bool = False
    hit: dict[str, Tensor] = field(default_factory=dict)  # tensor -> (experts,): a gradient other than zero
    bad: set[str] = field(default_factory=set)

    def reason(self, place: Place, name: str) -> str | None:
        """Why a tensor of this place does not train; None where it does, or where no token was routed to it."""
        if not place.tensors[name].requires_grad:
            return FROZEN
        if name in self.bad:
            return BAD
        if name in self.hit:
            return None if bool(self.hit[name].any()) else ZERO
        return CUT if self.called else NEVER


def gradient_checks(model: nn.Module, places: Sequence[Place], batches: Sequence[Any], loss: Loss) -> list[Check]:
    """Runs each batch forward and backward once, or again with other noise where a tensor got no gradient."""
    seen = {place: Seen() for place in places}
    for noise, seed in ATTEMPTS:
        for place in places:
            seen[place].bad.clear()
        if not _backward(model, seen, batches, loss, noise, seed):
            return [failed("the loss does not depend on the adapter: it has no gradient at all", REMEDY[CUT])]
        if not set(_missing(seen)) - {FROZEN}:
            break
    return _report(seen)


def _backward(
    model: nn.Module, seen: Mapping[Place, Seen], batches: Sequence[Any], loss: Loss, noise: float, seed: int
) -> bool:
    tensors = [tensor for place in seen for tensor in place.tensors.values() if tensor.requires_grad]
    with shaken(tensors, noise, seed), _watching(seen), torch.enable_grad():
        for batch in batches:
            value = loss(model, batch)
            if not value.requires_grad:
                return False
            value.backward()  # type: ignore[no-untyped-call]
            for place, found in seen.items():
                _take(place, found)
    return True


def _take(place: Place, found: Seen) -> None:
    """Notes and removes the gradients of one batch."""
    for name, tensor in place.tensors.items():
        grad, tensor.grad = tensor.grad, None
        if grad is None:
            continue
        per_expert = grad.detach().reshape(place.experts, -1).abs().amax(1)
        if not bool(torch.isfinite(per_expert).all()):
            found.bad.add(name)
        hit = (per_expert > 0).cpu()
        found.hit[name] = found.hit[name] | hit if name in found.hit else hit


@contextmanager
def _watching(seen: Mapping[Place, Seen]) -> Iterator[None]:
    """Notes which entries are called at all."""

    def noting(found: Seen) -> Callable[..., None]:
        def note(*_: Any) -> None:
            found.called = True

        return note

    handles = [place.entry.register_forward_pre_hook(noting(found)) for place, found in seen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _missing(seen: Mapping[Place, Seen]) -> dict[str, list[tuple[Place, str]]]:
    """What does not train, by reason. An expert is excused where another expert of its block was chosen."""
    chosen = {place.site.block for place, found in seen.items() if place.routed and place.site and found.hit}
    missing: dict[str, list[tuple[Place, str]]] = {}
    for place, found in seen.items():
        excused = place.experts == 1 and place.routed and place.site is not None and place.site.block in chosen
        for name in place.tensors:
            reason = found.reason(place, name)
            if reason is not None and not (excused and reason in (NEVER, ZERO)):
                missing.setdefault(reason, []).append((place, name))
    return missing


def _report(seen: Mapping[Place, Seen]) -> list[Check]:
    missing = _missing(seen)
    total = count(sum(len(place.tensors) for place in seen), "tensor")
    checks = [_line(reason, which, total) for reason, which in missing.items()]
    if not set(missing) - {FROZEN}:
        idle = _unrouted(seen)
        left = f"; not routed in these batches: {idle}" if idle else ""
        which = "the others" if missing else f"all {total}"
        checks.append(ok(f"{which} at {count(len(seen), 'site')} get a gradient{left}"))
    return checks


def _line(reason: str, which: Sequence[tuple[Place, str]], total: str) -> Check:
    tensors = some(f"{place.path}:{name}" for place, name in which)
    if reason == FROZEN:  # some methods freeze a part of their tensors on purpose
        return warning(
            f"{len(which)} of {total} are frozen while others of the adapter train: {tensors}", REMEDY[reason]
        )
    what = "have a gradient that is not finite" if reason == BAD else f"get no gradient, {reason}"
    return failed(f"{len(which)} of {total} {what}: {tensors}", REMEDY[reason])


def _unrouted(seen: Mapping[Place, Seen]) -> str:
    """The experts that no token of the batches was sent to."""
    stacks = {}
    for place, found in seen.items():
        hit = torch.stack(list(found.hit.values())).any(0) if found.hit else torch.zeros(place.experts).bool()
        if not bool(hit.all()):
            idle = (~hit).nonzero().flatten().tolist()
            stacks[place.path] = f"{place.path} {idle}" if place.experts > 1 else place.path
    return some(stacks.values()) if stacks else ""
