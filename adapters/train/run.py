"""A recipe from start to end: load, attach, score, train, score again, save, and prove that the file is the model."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import adapters
from adapters._contract import Method
from adapters._errors import AdapterError
from adapters._hub.quiet import quiet
from adapters.train.calls import FunctionCalls
from adapters.train.headlines import Sarcasm
from adapters.train.lesson import Lesson, Trained
from adapters.train.machine import peak_memory, use_all_cores
from adapters.train.outcome import Outcome, Scores, compare, print_examples, print_outcome, print_scores
from adapters.train.recipe import Recipe

_LESSONS: dict[str, Callable[[Recipe, Console], Lesson]] = {"function_calls": FunctionCalls, "sarcasm": Sarcasm}


def train(recipe: Recipe, output: str | Path | None = None, console: Console | None = None) -> Outcome:
    """Runs a recipe and prints what happens.

    Args:
        recipe: from `read_recipe`.
        output: folder of the adapter, in place of the recipe's.
        console: where to print; by default the standard output.

    Raises:
        AdapterError: something is missing; nothing was written.
        KeyboardInterrupt: with a sentence that says what there is and what to do.
    """
    started = time.perf_counter()
    console = console or Console()
    folder = Path(output or recipe.output.replace("{method}", recipe.method.name))
    state = f"no adapter was written to {folder}"
    try:
        with _prepared():
            lesson = _LESSONS[recipe.task](recipe, console)
            model, tokenizer = _load(lesson, console)
            torch.manual_seed(recipe.training.seed)
            method = _started(recipe, lesson, tokenizer)
            report = adapters.attach(model, method, name="default", targets=recipe.targets, tokenizer=tokenizer)
            console.print(str(report), highlight=False, markup=False, soft_wrap=True)
            with (
                adapters.using(model, None),
                _rows(console, f"scoring the {lesson.baseline}", lesson.rows()) as advance,
            ):
                base = lesson.base_answers(model, tokenizer, advance)
            trained, seconds = _train(lesson, model, tokenizer)
            with _rows(console, "scoring the adapted model", lesson.rows()) as advance:
                adapted = lesson.answers(model, tokenizer, range(lesson.rows()), advance)
            scores = compare(base, adapted)
            print_scores(console, scores, lesson.baseline)
            print_examples(console, lesson, base, adapted, recipe.evaluation.examples)
            adapters.save(model, "default", folder, facts=_facts(recipe, lesson, scores, trained))
            state = f"the adapter is in {folder}, but was not yet compared in a fresh base"
            rows = range(min(recipe.evaluation.examples, lesson.rows()))
            expected = _outputs(lesson, model, tokenizer, rows)
            del model
            equal, difference = _compare_fresh(lesson, expected, folder, rows, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: {state}. Run the command again, or shorter with --set training.steps=20."
        ) from None
    size = sum(file.stat().st_size for file in folder.glob("adapter_model*"))
    took = time.perf_counter() - started
    outcome = Outcome(
        report.method, scores, str(folder), size, equal, difference, trained, seconds, took, peak_memory()
    )
    print_outcome(console, outcome)
    return outcome


def evaluate(recipe: Recipe, adapter: str | Path, console: Console | None = None) -> Scores:
    """Scores a saved adapter, and its base, on the recipe's held-out rows."""
    console = console or Console()
    with _prepared():
        lesson = _LESSONS[recipe.task](recipe, console)
        model, tokenizer = _load(lesson, console)
        adapters.load(model, adapter, name="default")
        with adapters.using(model, None), _rows(console, f"scoring the {lesson.baseline}", lesson.rows()) as advance:
            base = lesson.base_answers(model, tokenizer, advance)
        with _rows(console, "scoring the adapted model", lesson.rows()) as advance:
            adapted = lesson.answers(model, tokenizer, range(lesson.rows()), advance)
    scores = compare(base, adapted)
    print_scores(console, scores, lesson.baseline)
    print_examples(console, lesson, base, adapted, recipe.evaluation.examples)
    return scores


@contextmanager
def _prepared() -> Iterator[None]:
    """Quiet libraries, all cores, and a clear sentence where the packages for training are missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process forks, as dataloaders do
    use_all_cores()
    try:
        with quiet():
            yield
    except ModuleNotFoundError as error:
        raise AdapterError(
            f'training needs the package {error.name}: run `pip install "adapter-registry[all]"` and try again.'
        ) from error


def _load(lesson: Lesson, console: Console) -> tuple[Any, Any]:
    with console.status("loading the base"):
        return lesson.load()


def _started(recipe: Recipe, lesson: Lesson, tokenizer: Any) -> Method:
    """The recipe's method, started from a worked example if it asks for one."""
    if recipe.start is None:
        return recipe.method
    whole = {"length": 0} if "length" in {field.name for field in fields(recipe.method)} else {}
    return replace(recipe.method, text=lesson.example(tokenizer), **whole)  # type: ignore[call-arg]


def _train(lesson: Lesson, model: Any, tokenizer: Any) -> tuple[Trained, float]:
    started = time.perf_counter()
    model.train()
    trained = lesson.train(model, tokenizer)
    model.eval()
    return trained, time.perf_counter() - started


def _outputs(lesson: Lesson, model: Any, tokenizer: Any, rows: range) -> tuple[list[str], torch.Tensor]:
    answers = lesson.answers(model, tokenizer, rows, lambda done: None)
    return [answer.text for answer in answers], lesson.logits(model, tokenizer, rows)


def _compare_fresh(
    lesson: Lesson, expected: tuple[list[str], torch.Tensor], folder: Path, rows: range, console: Console
) -> tuple[bool, float]:
    """Whether the saved adapter on a fresh base answers like the trained model, and how far its logits are off."""
    gc.collect()  # the trained model: two bases at once would set the peak of memory
    with console.status("loading the adapter into a fresh base"):
        fresh, tokenizer = lesson.load()
        adapters.load(fresh, folder, name="default")
        answers, logits = _outputs(lesson, fresh, tokenizer, rows)
    return answers == expected[0], float((logits - expected[1]).abs().max())


def _facts(recipe: Recipe, lesson: Lesson, scores: Scores, trained: Trained) -> dict[str, Any]:
    return {
        "task": recipe.task,
        **lesson.facts,
        "training": asdict(recipe.training),
        "tokens": trained.tokens,
        "learned_tokens": trained.learned,
        "scores": asdict(scores),
    }


@contextmanager
def _rows(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda rows: progress.update(task, advance=rows)
