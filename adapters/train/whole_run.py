"""A recipe from start to end: load, attach, try, train, score, save, and prove that the file is the model."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import adapters
from adapters._trainers import newest_checkpoint
from adapters.train import processes, unfinished
from adapters.train.ahead import ahead_of
from adapters.train.course import Course, run, try_out
from adapters.train.lesson import Lesson
from adapters.train.machine import hardware, peak_memory
from adapters.train.outcome import Outcome, Scores, compare, print_examples, print_outcome, print_scores
from adapters.train.pictures import draw
from adapters.train.preflight import Preflight
from adapters.train.preparing import LESSONS, attach, counting, load, make_trainer, prepare_process
from adapters.train.recipe import Recipe

Outputs = tuple[list[str], torch.Tensor]


@dataclass
class WholeRun:
    """One run and how far it is. `started` is the `time.perf_counter` from which wall time counts."""

    recipe: Recipe
    folder: Path
    given: Console | None
    started: float
    console: Console = field(init=False)
    state: str = field(init=False)

    def __post_init__(self) -> None:
        self.console = processes.console_of(self.given)
        self.state = f"no adapter was written to {self.folder}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / unfinished.FOLDER

    def interrupted(self) -> str:
        """What there is, and what to do about it."""
        newest = newest_checkpoint(self.checkpoints)
        if newest is not None:
            return f"interrupted: {self.state}. Go on from step {unfinished.step_of(newest)} with --resume."
        return f"interrupted: {self.state}. Run the command again, or shorter with --set training.steps=20."

    def to_the_end(self, resume: bool, restart: bool) -> Outcome | None:
        """Everything, from the base to the comparison with a fresh one."""
        recipe, console = self.recipe, self.console
        checkpoint, says = unfinished.begin(self.checkpoints, recipe, resume, restart)
        if says:
            console.print(says, highlight=False, markup=False, soft_wrap=True)
        prepare_process()
        lesson = LESSONS[recipe.task](recipe, console)
        model, tokenizer = load(lesson, console)
        report = attach(recipe, lesson, model, tokenizer, console)
        course = self._trained(lesson, model, tokenizer, checkpoint)
        scores = scored(recipe, lesson, model, tokenizer, console)
        facts = _facts(recipe, lesson, scores, course, checkpoint)
        picture = self._saved(model, course, facts)
        rows = range(min(recipe.evaluation.examples, lesson.rows()))
        expected = _outputs(lesson, model, tokenizer, rows)
        del model
        if not processes.is_first():
            return None
        fresh = _compare_fresh(lesson, expected, self.folder, rows, console)
        if not recipe.training.keep_checkpoints:
            unfinished.remove(self.checkpoints)
        return self._outcome(report.method, scores, course, fresh, picture, checkpoint)

    def _outcome(
        self,
        method: str,
        scores: Scores,
        course: Course,
        fresh: tuple[bool, float],
        picture: Path | None,
        checkpoint: str | None,
    ) -> Outcome:
        """What the run came to, printed."""
        outcome = Outcome(
            method=method,
            scores=scores,
            folder=str(self.folder),
            adapter_bytes=sum(file.stat().st_size for file in self.folder.glob("adapter_model*")),
            equal_answers=fresh[0],
            largest_logit_difference=fresh[1],
            trained=course.trained,
            training_seconds=course.seconds,
            seconds=time.perf_counter() - self.started,
            peak_bytes=peak_memory(),
            picture=str(picture),
            resumed_from=unfinished.step_of(checkpoint) if checkpoint else None,
            warnings=tuple(check.what for check in course.preflight.warnings),
            findings=course.findings,
        )
        print_outcome(self.console, outcome)
        return outcome

    def _trained(self, lesson: Lesson, model: Any, tokenizer: Any, checkpoint: str | None) -> Course:
        with _trainer(self.recipe, lesson, model, tokenizer, self.folder) as trainer:
            return run(self.recipe, lesson, trainer, tokenizer, self.folder, checkpoint, self.console)

    def _saved(self, model: Any, course: Course, facts: dict[str, Any]) -> Path | None:
        """Writes adapter and picture, in the first process alone unless all are needed to gather the tensors."""
        together = processes.sharded(model)
        if together or processes.is_first():
            adapters.save(model, "default", self.folder, facts=facts)
        self.state = f"the adapter is in {self.folder}, but was not yet compared in a fresh base"
        if not processes.is_first():
            return None
        whole = None if together else model  # how far layers moved can be measured on whole tensors only
        return draw(self.folder, course.history, whole, course.start, course.counts, "default" if whole else None)


def score_saved(recipe: Recipe, adapter: str | Path, given: Console | None) -> Scores:
    """Scores a saved adapter, and its base, on the recipe's held-out rows."""
    console = processes.console_of(given)
    prepare_process()
    lesson = LESSONS[recipe.task](recipe, console)
    model, tokenizer = load(lesson, console)
    adapters.load(model, adapter, name="default")
    return scored(recipe, lesson, model, tokenizer, console)


def examine_only(recipe: Recipe, output: Path, given: Console | None) -> Preflight:
    """Everything up to the first step."""
    console = processes.console_of(given)
    prepare_process()
    lesson = LESSONS[recipe.task](recipe, console)
    model, tokenizer = load(lesson, console)
    attach(recipe, lesson, model, tokenizer, console)
    with _trainer(recipe, lesson, model, tokenizer, output) as trainer:
        return try_out(recipe, trainer, ahead_of(trainer), tokenizer, output, console)


def scored(recipe: Recipe, lesson: Lesson, model: Any, tokenizer: Any, console: Console) -> Scores:
    """Base and adapted model on the held-out rows, printed side by side."""
    with adapters.using(model, None), counting(console, f"scoring the {lesson.baseline}", lesson.rows()) as advance:
        base = lesson.base_answers(model, tokenizer, advance)
    with counting(console, "scoring the adapted model", lesson.rows()) as advance:
        adapted = lesson.answers(model, tokenizer, range(lesson.rows()), advance)
    scores = compare(base, adapted)
    print_scores(console, scores, lesson.baseline)
    print_examples(console, lesson, base, adapted, recipe.evaluation.examples)
    return scores


@contextmanager
def _trainer(recipe: Recipe, lesson: Lesson, model: Any, tokenizer: Any, output: Path) -> Iterator[Any]:
    """The trainer, with a folder for what it only demands; TensorBoard's files go beside the adapter."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "runs"))
    with tempfile.TemporaryDirectory() as folder:
        yield make_trainer(recipe, lesson, model, tokenizer, folder)


def _outputs(lesson: Lesson, model: Any, tokenizer: Any, rows: range) -> Outputs:
    answers = lesson.answers(model, tokenizer, rows, lambda done: None)
    return [answer.text for answer in answers], lesson.logits(model, tokenizer, rows)


def _compare_fresh(
    lesson: Lesson, expected: Outputs, folder: Path, rows: range, console: Console
) -> tuple[bool, float]:
    """Whether the saved adapter on a fresh base answers like the trained model, and how far its logits are off."""
    gc.collect()  # the trained model: two bases at once would set the peak of memory
    with console.status("loading the adapter into a fresh base"):
        fresh, tokenizer = lesson.load(processes.device())
        adapters.load(fresh, folder, name="default")
        answers, logits = _outputs(lesson, fresh, tokenizer, rows)
    return answers == expected[0], float((logits - expected[1]).abs().max())


def _facts(recipe: Recipe, lesson: Lesson, scores: Scores, course: Course, checkpoint: str | None) -> dict[str, Any]:
    return {
        "task": recipe.task,
        **lesson.facts,
        "training": asdict(recipe.training),
        "tokens": course.trained.tokens,
        "learned_tokens": course.trained.learned,
        "scores": {**asdict(scores), "compared": "loss" if scores.tokens is not None else list(scores.base)[-1]},
        "hardware": hardware(),
        "losses": [entry["loss"] for entry in course.history if "loss" in entry],
        "held_out_losses": {entry["step"]: entry["eval_loss"] for entry in course.history if "eval_loss" in entry},
        "preflight": {"warnings": [check.what for check in course.preflight.warnings]},
        "watchdog": list(course.findings),
        "resumed_from": unfinished.step_of(checkpoint) if checkpoint else None,
    }
