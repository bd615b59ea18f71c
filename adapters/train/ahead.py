"""What a trainer has before it, and the preflight of any trainer of transformers' on it."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from adapters._attach import adapters_of
from adapters._errors import AdapterError
from adapters._trainers.trainer import attached_within
from adapters.train import processes
from adapters.train.preflight import Preflight, preflight
from adapters.train.watchdog import LOG, Watchdog

TRIED = 2  # micro-batches of the first step that the preflight runs


@dataclass(frozen=True)
class Ahead:
    """The first micro-batches of a trainer's first step in this process, and the steps of the whole run."""

    batches: list[Any]
    steps: int


def try_out(trainer: Any) -> Preflight:
    """The preflight of a `transformers.Trainer` with an attached model: its first rows, its loss, its settings.

    The model, its gradients and the random numbers are afterwards as they were. Call it before `train`, which
    `adapters.train.SFTTrainer` does by itself.

    Args:
        trainer: any trainer of transformers' or TRL's whose batches are rows of tokens; trainers that make their rows
            as they go, as GRPO's does, have nothing to try.
    """
    ahead, args = ahead_of(trainer), trainer.args
    model = attached_within(trainer.model)
    trained = [name for name, each in adapters_of(model).items() if each.trainable] if model is not None else []
    processing = getattr(trainer, "processing_class", None)
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    return preflight(
        trainer.model,
        ahead.batches,
        tokenizer=getattr(processing, "tokenizer", processing),
        learning_rate=args.learning_rate,
        warmup_steps=args.get_warmup_steps(ahead.steps),
        total_steps=ahead.steps,
        schedule=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        output=os.path.dirname(os.path.abspath(args.output_dir)),
        checkpoints=(args.save_total_limit or 1) + 1 if saves else 0,
        name=trained[0] if len(trained) == 1 else None,
        loss=loss_of(trainer),
    )


def started(trainer: Any) -> Preflight:
    """The preflight in the first process, and a watchdog in all of them.

    Raises:
        AdapterError: something failed; every process raises.
    """
    found = try_out(trainer) if processes.is_first() else Preflight(())
    for line in str(found).splitlines() if found.checks else ():
        LOG.log(logging.INFO if found.passed and not found.warnings else logging.WARNING, line)
    if processes.anywhere(not found.passed):
        failures = "; ".join(f"{check.what}: {check.remedy}" for check in found.failures) or "see the first process"
        raise AdapterError(f"the preflight failed and nothing was trained: {failures}.")
    watched = any(isinstance(each, Watchdog) for each in trainer.callback_handler.callbacks)
    if not watched and not trainer.is_fsdp_enabled:  # its sums are over whole tensors
        trainer.add_callback(Watchdog())
    return found


def ahead_of(trainer: Any) -> Ahead:
    """Reads the first rows as training will, and draws no random number."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        loader = trainer.get_train_dataloader()
        steps = int(trainer.set_initial_training_values(trainer.args, loader)[-1])
        # accelerate's loader would take part in its count of steps
        base = getattr(loader, "base_dataloader", loader)
        most = min(TRIED, trainer.args.gradient_accumulation_steps)
        return Ahead(list(islice(iter(base), most)), steps)


def loss_of(trainer: Any) -> Any:
    """The trainer's loss, computed by a copy of it whose counts nobody reads."""
    bystander = copy.copy(trainer)
    for name in ("_sums", "_metrics"):
        if hasattr(trainer, name):
            setattr(bystander, name, copy.deepcopy(getattr(trainer, name)))

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        with trainer.compute_loss_context_manager():
            value: Tensor = bystander.compute_loss(model, dict(batch))
        return value

    return loss
