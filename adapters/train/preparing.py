"""What every run of a recipe begins with: the rows, the base, and the adapter on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import adapters
from adapters._attach import AttachReport
from adapters._contract import Method
from adapters._errors import AdapterError
from adapters.train import processes
from adapters.train.calls import FunctionCalls
from adapters.train.headlines import Sarcasm
from adapters.train.instruct import Instruction
from adapters.train.lesson import Lesson
from adapters.train.machine import use_all_cores
from adapters.train.recipe import Recipe

LESSONS: dict[str, Callable[[Recipe, Console], Lesson]] = {
    "function_calls": FunctionCalls,
    "sarcasm": Sarcasm,
    "instruction": Instruction,
}


def prepare_process() -> None:
    """All cores, and tokenizers that may be forked."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process forks, as dataloaders do
    use_all_cores()


def load(lesson: Lesson, console: Console) -> tuple[Any, Any]:
    """The base and its tokenizer."""
    with console.status("loading the base"):
        return lesson.load(processes.device())


def attach(recipe: Recipe, lesson: Lesson, model: Any, tokenizer: Any, console: Console) -> AttachReport:
    """Attaches the recipe's method as "default", and prints the report."""
    torch.manual_seed(recipe.training.seed)
    method = _started(recipe, lesson, tokenizer)
    report = adapters.attach(model, method, name="default", targets=recipe.targets, tokenizer=tokenizer)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    return report


def make_trainer(recipe: Recipe, lesson: Lesson, model: Any, tokenizer: Any, folder: str) -> Any:
    """The lesson's trainer; a refusal of the user's own arguments becomes one sentence."""
    try:
        return lesson.trainer(model, tokenizer, folder)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        own = [name for name in ("arguments", "report_to") if getattr(recipe.training, name)]
        if not own or isinstance(error, AdapterError | ModuleNotFoundError):
            raise
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise AdapterError(f"the trainer refuses training.{' or training.'.join(own)}: {said}.") from error


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over rows."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda rows: progress.update(task, advance=rows)


def _started(recipe: Recipe, lesson: Lesson, tokenizer: Any) -> Method:
    """The recipe's method, started from a worked example if it asks for one."""
    if recipe.start is None:
        return recipe.method
    whole = {"length": 0} if "length" in {field.name for field in fields(recipe.method)} else {}
    return replace(recipe.method, text=lesson.example(tokenizer), **whole)  # type: ignore[call-arg]
