"""Training itself: tried before the first step, watched while it goes, kept in checkpoints, drawn at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from torch import Tensor

from adapters._errors import AdapterError
from adapters.train import processes, unfinished
from adapters.train.ahead import Ahead, ahead_of, loss_of
from adapters.train.lesson import Lesson, Trained
from adapters.train.pictures import Counts, token_counts
from adapters.train.preflight import Preflight, preflight
from adapters.train.recipe import Recipe
from adapters.train.remembered import Learned, Patience
from adapters.train.steps import KEPT, stop_showing
from adapters.train.watchdog import LOG, Watchdog
from adapters.train.weight_change import start_of


@dataclass(frozen=True)
class Course:
    """One training: what it went through, what was found, and what its picture is drawn from."""

    trained: Trained
    seconds: float
    preflight: Preflight
    findings: tuple[str, ...]
    history: Sequence[Mapping[str, Any]]
    start: Mapping[str, Tensor]
    counts: Counts


def try_out(recipe: Recipe, trainer: Any, ahead: Ahead, tokenizer: Any, output: Path, console: Console) -> Preflight:
    """The preflight of a trainer on the rows that it will see first and with its loss, printed.

    Under several processes the first one looks, at a model that is not divided among them yet.
    """
    found = Preflight(())
    if processes.is_first():
        training = recipe.training
        makes = _every(recipe, ahead.steps) is not None
        with console.status("preflight: trying the first rows"):
            found = preflight(
                trainer.model,
                ahead.batches,
                tokenizer=tokenizer,
                learning_rate=training.learning_rate,
                warmup_steps=training.warmup,
                total_steps=ahead.steps,
                schedule=training.schedule,
                output=output,
                checkpoints=KEPT + 1 if makes else 0,  # an old one goes when the new one is written
                name="default",
                loss=loss_of(trainer),
            )
        console.print(str(found), highlight=False, markup=False, soft_wrap=True)
    return found


def run(
    recipe: Recipe,
    lesson: Lesson,
    trainer: Any,
    tokenizer: Any,
    output: Path,
    checkpoint: str | None,
    console: Console,
) -> Course:
    """Trains, after a preflight that nothing failed in.

    Args:
        output: folder of the adapter; checkpoints go beside it.
        checkpoint: to go on from.

    Raises:
        AdapterError: the preflight failed, the checkpoint was made on other rows, or the watchdog stopped the run.
    """
    kept = output / unfinished.FOLDER
    facts = {"rows": unfinished.digest(trainer.train_dataset), "processes": processes.number()}
    if checkpoint is not None:
        unfinished.require_same(kept, facts)
    ahead = ahead_of(trainer)
    found = try_out(recipe, trainer, ahead, tokenizer, output, console)
    if processes.anywhere(not found.passed):
        failures = "; ".join(check.what for check in found.failures) or "see the first process"
        raise AdapterError(f"the preflight failed and nothing was trained: {failures}.")
    followers = _followers(recipe, trainer)
    _keep(recipe, trainer, ahead.steps, kept, checkpoint, facts)
    start = start_of(trainer.model, "default")
    began = time.perf_counter()
    with _logged(console):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            stop_showing(trainer)
    trainer.model.eval()
    learned = next((each.tokens for each in followers if isinstance(each, Learned)), 0)
    trained, seconds = lesson.trained(trainer, learned), time.perf_counter() - began
    return Course(trained, seconds, found, _found(followers), trainer.state.log_history, start, _counts(trainer))


def _followers(recipe: Recipe, trainer: Any) -> list[Any]:
    """Adds to the trainer what follows its steps."""
    made: list[Any] = []
    if not trainer.is_fsdp_enabled:  # its sums are over whole tensors
        made.append(Watchdog(name="default"))
    if hasattr(trainer, "learned"):
        made.append(Learned(trainer))
    if recipe.training.patience is not None:
        made.append(Patience(recipe.training.patience))
    for each in made:
        trainer.add_callback(each)
    return made


def _found(followers: Sequence[Any]) -> tuple[str, ...]:
    watchdog = next((each for each in followers if isinstance(each, Watchdog)), None)
    if watchdog is None:
        return ("the run was not watched: the adapter's tensors were divided among processes",)
    return tuple(map(str, watchdog.findings))


def _every(recipe: Recipe, steps: int) -> int | None:
    """Steps between two checkpoints; None: there will be none."""
    training = recipe.training
    if training.patience is not None:
        return training.eval_steps
    return training.save_steps if 0 < training.save_steps < steps else None


def _keep(
    recipe: Recipe, trainer: Any, steps: int, folder: Path, checkpoint: str | None, facts: Mapping[str, Any]
) -> None:
    """Has the trainer write its checkpoints into `folder`, which says what they were made with."""
    from transformers.trainer_utils import SaveStrategy

    every = _every(recipe, steps)
    if every is None:
        if processes.is_first():
            unfinished.remove(folder)
        return
    if checkpoint is None:
        unfinished.record(folder, {**unfinished.values_of(recipe), **facts})
    trainer.args.output_dir = str(folder)
    trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, every


@contextmanager
def _logged(console: Console) -> Iterator[None]:
    """What the watchdog logs is printed above the bar."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    before, LOG.propagate = LOG.propagate, False
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.propagate = before


def _counts(trainer: Any) -> Counts:
    """Tokens of each row and how many of them are learned; a row of a classifier teaches one label."""
    report = getattr(trainer, "data", None)
    if report is not None:
        return report.lengths, report.learned
    rows = trainer.train_dataset
    if "labels" in rows.column_names:
        return token_counts(rows)
    lengths = [len(ids) for ids in rows["input_ids"]]
    return lengths, [1] * len(lengths)
