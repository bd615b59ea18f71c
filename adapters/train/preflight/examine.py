"""The preflight itself: looks at everything that needs no forward, then runs the first batches."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach import base_parameters, unwrapped
from adapters._errors import AdapterError
from adapters._finite import finite
from adapters.train.preflight.disk import disk_check
from adapters.train.preflight.gradients import Loss, gradient_checks
from adapters.train.preflight.labels import label_checks, turn_check
from adapters.train.preflight.places import Place
from adapters.train.preflight.rates import Schedule, rate_checks
from adapters.train.preflight.report import Check, Preflight, failed, ok, some, warning
from adapters.train.preflight.rows import head_of, placed
from adapters.train.preflight.scope import base_checks, scope_checks, value_checks
from adapters.train.preflight.template import tokenizer_checks, turn_of
from adapters.train.preflight.undisturbed import undisturbed

FAR = 1.0  # nats above ln(vocabulary), the loss of a guess that knows nothing


def preflight(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    learning_rate: float | None = None,
    warmup_steps: float | None = None,
    total_steps: int | None = None,
    schedule: Schedule | None = None,
    output: str | os.PathLike[str] | None = None,
    checkpoints: int = 0,
    name: str | None = None,
    loss: Loss | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Preflight:
    """Looks for all that would make a run worthless, on the model and the batches that it would see first.

    The model is run forward and backward in training mode with noise on the adapter's tensors, and is afterwards bit
    for bit as before, with its gradients, buffers, modes and random generators. To be called before the model is
    wrapped for several processes.

    Args:
        model: with an adapter attached that trains and acts.
        batches: one or more, each the keyword arguments of a forward with `labels`, -100 where nothing is learned.
        tokenizer: to check the end of the turn, the chat template and padding.
        learning_rate: the largest, as Adam takes it.
        warmup_steps: steps, or a share of the run if below 1.
        total_steps: optimizer steps of the run.
        schedule: a name, or factors of the learning rate by step, as a sequence or a function.
        output: folder that the run will write to.
        checkpoints: how many checkpoints it will keep.
        name: the adapter to be trained; None takes what trains and acts.
        loss: the scalar to minimise, from model and batch; None takes the model's own.
        folder: where the adapter was loaded from, to compare the base with its record.

    Raises:
        AdapterError: there is no batch, or no adapter of that name. What is wrong with the run is in the result.
    """
    batches = [batches] if isinstance(batches, Mapping) else list(batches)
    if not batches:
        raise AdapterError("a preflight needs at least one batch of the data that training would see.")
    model = unwrapped(model)
    places, checks = scope_checks(model, name)
    if places:
        adapters = list(dict.fromkeys(place.adapter for place in places))
        checks += base_checks(model, adapters, folder)
    usable, found = label_checks(model, batches, own_loss=loss is not None)
    checks += found
    if tokenizer is not None:
        turn = turn_of(model, tokenizer)
        checks += [*turn_check(model, batches, turn), *tokenizer_checks(model, tokenizer, turn, batches)]
    checks += rate_checks(places, learning_rate, warmup_steps, total_steps, schedule)
    if output is not None:
        checks.append(disk_check(places, output, checkpoints))
    checks += _tried(model, places, [batches[i] for i in usable], loss)
    missing = {"tokenizer": tokenizer, "learning_rate": learning_rate, "total_steps": total_steps, "output": output}
    left = [key for key, value in missing.items() if value is None]
    return Preflight((*checks, *([ok(f"not looked at, as not given: {', '.join(left)}")] if left else [])))


def _tried(
    model: nn.Module, places: Sequence[Place], batches: Sequence[Mapping[str, Any]], loss: Loss | None
) -> list[Check]:
    """Runs the model: the loss as it is, then the gradients."""
    bad = value_checks(places)
    if bad or not places or not batches:
        why = "the adapter is not finite" if bad else "no batch can be run" if places else "nothing trains"
        return [*bad, warning(f"loss and gradients were not tried: {why}", "mend what failed and look again")]
    device = next(model.parameters()).device
    batches = [placed(batch, device) for batch in batches]
    with undisturbed(model):
        try:
            first = _first_loss(model, batches[0], loss)
            if first.status == "failed":
                return [first]
            return [first, *gradient_checks(model, places, batches, loss or own_loss)]
        except Exception as error:  # whatever a model raises on a batch is what the preflight has found
            text = " ".join(str(error).split())[:300]
            what = f"the batches do not go through the model: {type(error).__name__}: {text}"
            return [failed(what, "look at what the batches hold, and at the memory that one of them needs")]


def own_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a model computes from `labels`."""
    result = model(**batch).loss
    if not isinstance(result, Tensor):
        raise AdapterError("the model returns no loss for these batches: give `loss`, or batches with labels.")
    return result


def _first_loss(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None) -> Check:
    with torch.enable_grad():  # as in training: without it, checkpointing warns
        value = float((loss or own_loss)(model, batch).detach())
    if not math.isfinite(value):
        bad = [path for path, p in base_parameters(model).items() if p.is_floating_point() and not finite(p.detach())]
        why = f"values of the base are not finite: {some(bad)}" if bad else "all weights are finite"
        what = f"the loss of the first batch is {value:g}; {why}"
        remedy = "load the base again" if bad else "in float16 activations overflow: use bfloat16 or float32"
        return failed(what, remedy)
    head = head_of(model)
    if loss is not None or not head.language or not head.classes:
        return ok(f"the loss of the first batch is {value:.3g}")
    guess = math.log(head.classes)
    compared = f"the loss of the first batch is {value:.3g}, that of guessing ln {head.classes:,} = {guess:.3g}"
    if value > guess + FAR:
        return warning(
            f"{compared}: worse than knowing nothing", "is it the tokenizer of this base, and the right base?"
        )
    if value <= 0:
        return warning(f"{compared}: there is nothing left to learn", "do the labels give the answer away?")
    return ok(compared)
