"""A progress bar over the steps of any transformers trainer, and the settings that all recipes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback

from adapters._errors import AdapterError
from adapters.train import processes
from adapters.train.recipe import Training

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
KEPT = 2  # newest checkpoints
# arguments of transformers' and TRL's trainers that keys of a recipe decide
KEYS: Mapping[str, str] = {
    "output_dir": "output",
    "max_steps": "training.steps",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.micro_batch",
    "per_device_eval_batch_size": "training.micro_batch",
    "gradient_accumulation_steps": "training.batch",
    "learning_rate": "training.learning_rate",
    "warmup_steps": "training.warmup",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.clip",
    "lr_scheduler_type": "training.schedule",
    "seed": "training.seed",
    "data_seed": "training.seed",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "max_length": "training.max_tokens",
    "padding_free": "training.layout",
    "save_strategy": "training.save_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_steps",
    "eval_strategy": "training.eval_steps",
    "eval_steps": "training.eval_steps",
    "load_best_model_at_end": "training.patience",
    "metric_for_best_model": "training.patience",
    "greater_is_better": "training.patience",
    "report_to": "training.report_to",
    "resume_from_checkpoint": "--resume",
    "restore_callback_states_from_checkpoint": "--resume",
}


def settings(training: Training, folder: str) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments`; where checkpoints go is settled later, `folder` is only demanded.

    Raises:
        AdapterError: the rows of a step cannot be shared equally among the processes.
    """
    kind = {"constant": "constant_with_warmup"}.get(training.schedule, training.schedule)
    return {
        "output_dir": folder,
        "max_steps": training.steps if training.steps is not None else -1,
        "num_train_epochs": training.epochs if training.epochs is not None else 1.0,
        "per_device_train_batch_size": training.micro_batch,
        "per_device_eval_batch_size": training.micro_batch,
        "gradient_accumulation_steps": _micro_batches(training),
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.clip,
        "lr_scheduler_type": kind,
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "save_total_limit": KEPT,
        "report_to": list(training.report_to),
        "disable_tqdm": True,
        "use_cpu": processes.without_accelerator(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": training.gradient_checkpointing,
        "bf16": False,  # the base computes in its own dtype; autocast would cast the trained fp32 tensors
        **_evaluating(training),
        **training.arguments,
    }


def _micro_batches(training: Training) -> int:
    """Forwards of one process in one step."""
    shared = processes.number()
    if training.batch % (training.micro_batch * shared):
        raise AdapterError(
            f"training.batch ({training.batch} rows) must be a multiple of training.micro_batch "
            f"({training.micro_batch} rows) times the number of processes ({shared})."
        )
    return training.batch // (training.micro_batch * shared)


def _evaluating(training: Training) -> dict[str, Any]:
    if training.eval_steps is None:
        return {"save_strategy": "no"}
    every = {"eval_strategy": "steps", "eval_steps": training.eval_steps}
    if training.patience is None:
        return {**every, "save_strategy": "no"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return {**every, **best, "save_strategy": "steps", "save_steps": training.eval_steps}


def show_steps(trainer: Any, console: Console) -> None:
    """Replaces the trainer's printing of every log by one bar with the running loss."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Bar(console))


class _Bar(TrainerCallback):  # type: ignore[misc]
    def __init__(self, console: Console) -> None:
        self.progress = Progress(*_COLUMNS, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.progress.add_task("training", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, description=f"training, loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def stop_showing(trainer: Any) -> None:
    """Takes the bar away, also where training ended by an error."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Bar):
            callback.progress.stop()
