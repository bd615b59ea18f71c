"""A progress bar over the steps of any transformers trainer, and the settings that all recipes share."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback

from adapters.train.recipe import Training

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def settings(training: Training, folder: str) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments`; nothing is saved on the way, `folder` is only demanded."""
    kind = {"constant": "constant_with_warmup"}.get(training.schedule, training.schedule)
    return {
        "output_dir": folder,
        "max_steps": training.steps,
        "per_device_train_batch_size": training.micro_batch,
        "gradient_accumulation_steps": training.batch // training.micro_batch,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.clip,
        "lr_scheduler_type": kind,
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "bf16": False,  # the base computes in its own dtype; autocast would cast the trained fp32 tensors
    }


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
