"""The facts that a run ends with, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.data import paired_interval
from adapters.train.lesson import Answer, Lesson, Trained


@dataclass(frozen=True)
class Scores:
    """Shares of held-out rows, and the paired 95 % interval of the difference in the last of the marks.

    Where `tokens` is not None, they are means over so many learned tokens instead, in nats; `perplexity` is e to the
    loss.
    """

    rows: int
    base: Mapping[str, float]
    adapted: Mapping[str, float]
    interval: tuple[float, float]
    tokens: int | None = None


@dataclass(frozen=True)
class Outcome:
    """One run. `seconds` is wall time; `peak_bytes` the largest resident memory of the whole process.

    `resumed_from` is the step of a checkpoint, or None where training started at the beginning; `warnings` are the
    preflight's, `findings` the watchdog's.
    """

    method: str
    scores: Scores
    folder: str
    adapter_bytes: int
    equal_answers: bool
    largest_logit_difference: float
    trained: Trained
    training_seconds: float
    seconds: float
    peak_bytes: int | None
    picture: str
    resumed_from: int | None
    warnings: tuple[str, ...]
    findings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(base: Sequence[Answer], adapted: Sequence[Answer]) -> Scores:
    """The scores of two models that answered the same rows."""
    last = list(base[0].marks)[-1]
    if base[0].tokens is not None:
        return _compare_losses(base, adapted, last)
    interval = paired_interval([bool(a.marks[last]) for a in base], [bool(a.marks[last]) for a in adapted])
    return Scores(len(base), _shares(base), _shares(adapted), interval)


def _compare_losses(base: Sequence[Answer], adapted: Sequence[Answer], mark: str) -> Scores:
    tokens = [answer.tokens or 0 for answer in base]
    sums = [[answer.marks[mark] * (answer.tokens or 0) for answer in answers] for answers in (base, adapted)]
    means = [sum(each) / sum(tokens) for each in sums]
    interval = ratio_interval([new - old for old, new in zip(*sums, strict=True)], tokens)
    scores = [{mark: mean, "perplexity": math.exp(mean)} for mean in means]
    return Scores(len(base), scores[0], scores[1], interval, sum(tokens))


def ratio_interval(
    differences: Sequence[float], tokens: Sequence[int], resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of `sum(differences) / sum(tokens)`, by resampling rows (percentile bootstrap).

    >>> ratio_interval([-1.0, -3.0], [2, 6])
    (-0.5, -0.5)
    """
    pairs = torch.tensor([list(differences), list(tokens)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    sums = [pairs[:, torch.randint(len(tokens), (len(tokens),), generator=generator)].sum(1) for _ in range(resamples)]
    ratios = sorted(float(difference / count) for difference, count in sums)
    return ratios[int(0.025 * resamples)], ratios[int(0.975 * resamples) - 1]


def print_scores(console: Console, scores: Scores, baseline: str) -> None:
    """Base and adapted model side by side."""
    losses = scores.tokens is not None
    title = f"{scores.rows} held-out rows" + (f", {scores.tokens:,} learned tokens" if losses else "")
    table = Table(title=title, title_justify="left")
    for column in ("", baseline, "adapted", "change" if losses else "gain", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    compared = "loss" if losses else list(scores.base)[-1]
    for mark, before in scores.base.items():
        after = scores.adapted[mark]
        shown = (_signed(losses, scores.interval[0]), _signed(losses, scores.interval[1]))
        name = "loss (nats a token)" if losses and mark == compared else mark
        cells = [name, _score(losses, before), _score(losses, after), _signed(losses, after - before)]
        table.add_row(*cells, " to ".join(shown) if mark == compared else "")
    console.print(table)


def _score(losses: bool, value: float) -> str:
    return f"{value:.4g}" if losses else f"{100 * value:.1f} %"


def _signed(losses: bool, value: float) -> str:
    return f"{value:+.3g}" if losses else f"{100 * value:+.1f}"


def print_examples(
    console: Console, lesson: Lesson, base: Sequence[Answer], adapted: Sequence[Answer], count: int
) -> None:
    """The first held-out rows with the right answer and both models' answers."""
    for row in range(min(count, len(base))):
        console.print(Text(f"\n{row + 1}. {lesson.prompt(row)}", style="bold"), soft_wrap=True)
        said = {"right": lesson.reference(row), lesson.baseline: base[row].text, "adapted": adapted[row].text}
        for name, text in said.items():
            console.print(Text(f"   {name:<{max(map(len, said))}}  {_short(text)}"), soft_wrap=True)


def print_outcome(console: Console, outcome: Outcome) -> None:
    """What was written, that it loads back, and what the run took."""
    peak = "not known here" if outcome.peak_bytes is None else f"{outcome.peak_bytes / 2**30:.2f} GiB"
    equal = "equal" if outcome.equal_answers else "DIFFERENT"
    lines = [
        f"\nadapter     {outcome.folder} ({outcome.adapter_bytes / 1e6:.1f} MB)",
        f"fresh base  answers {equal}, largest logit difference {outcome.largest_logit_difference:g}",
        f"trained on  {outcome.trained.tokens:,} tokens, loss on {outcome.trained.learned:,}",
        f"wall time   {outcome.seconds:.0f} s, of which training {outcome.training_seconds:.0f} s",
        f"peak memory {peak}",
        f"picture     {outcome.picture}",
        *(f"watchdog    {finding}" for finding in outcome.findings),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _shares(answers: Sequence[Answer]) -> dict[str, float]:
    return {mark: sum(answer.marks[mark] for answer in answers) / len(answers) for mark in answers[0].marks}


def _short(text: str, longest: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
