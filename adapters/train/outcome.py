"""The facts that a run ends with, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.data import paired_interval
from adapters.train.lesson import Answer, Lesson, Trained


@dataclass(frozen=True)
class Scores:
    """Shares of held-out rows, and the paired 95 % interval of the difference in the last of the marks."""

    rows: int
    base: Mapping[str, float]
    adapted: Mapping[str, float]
    interval: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """One run. `seconds` is wall time; `peak_bytes` the largest resident memory of the whole process."""

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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(base: Sequence[Answer], adapted: Sequence[Answer]) -> Scores:
    """The scores of two models that answered the same rows."""
    last = list(base[0].marks)[-1]
    interval = paired_interval([a.marks[last] for a in base], [a.marks[last] for a in adapted])
    return Scores(len(base), _shares(base), _shares(adapted), interval)


def print_scores(console: Console, scores: Scores, baseline: str) -> None:
    """Base and adapted model side by side."""
    table = Table(title=f"{scores.rows} held-out rows", title_justify="left")
    for column in ("", baseline, "adapted", "gain", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    low, high = scores.interval
    last = list(scores.base)[-1]
    for mark, share in scores.base.items():
        shown = f"{100 * low:+.1f} to {100 * high:+.1f}" if mark == last else ""
        gain = scores.adapted[mark] - share
        table.add_row(mark, f"{100 * share:.1f} %", f"{100 * scores.adapted[mark]:.1f} %", f"{100 * gain:+.1f}", shown)
    console.print(table)


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
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _shares(answers: Sequence[Answer]) -> dict[str, float]:
    return {mark: sum(answer.marks[mark] for answer in answers) / len(answers) for mark in answers[0].marks}


def _short(text: str, longest: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
