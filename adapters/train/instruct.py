"""The lesson `instruction`: the user's own rows, scored by the loss on held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from torch import Tensor

from adapters._errors import AdapterError
from adapters._hub import load_base
from adapters.data import DataReport, prepare
from adapters.data.recognition import recognise
from adapters.data.tokens import IGNORED
from adapters.train.generation import generate
from adapters.train.held_out import last_answer, learned_logits, losses, shared
from adapters.train.lesson import Advance, Answer, Trained
from adapters.train.own_rows import read_own
from adapters.train.recipe import Recipe

_SHOWN = 300  # characters of a prompt, its end, that are printed


class Instruction:
    """Rows of any shape, learned through `InstructionTrainer`, or `SFTTrainer` where they are plain text."""

    baseline = "base"

    def __init__(self, recipe: Recipe, console: Console) -> None:
        assert recipe.data is not None, "checked when the recipe is read"
        self.recipe, self.console, self.data = recipe, console, recipe.data
        self.own = read_own(self.data, recipe.evaluation.rows)
        self.how: dict[str, Any] = {name: getattr(self.data, name) or None for name in ("columns", "roles", "system")}
        self.how |= {"learn": self.data.learn, "too_long": self.data.too_long}
        self.facts: dict[str, Any] = {"data": self.data.path, "held_out": self.own.parted}
        self.held_out: list[dict[str, Any]] = []

    def load(self, device: Any) -> tuple[Any, Any]:
        recipe = self.recipe
        quantize = recipe.quantize or recipe.method.quantize
        model, tokenizer = load_base(recipe.base, quantize, recipe.dtype, device, kind="causal")
        if tokenizer is None:
            raise AdapterError(f"the base {recipe.base!r} has no tokenizer, without which rows are no tokens.")
        if not self.held_out:
            rows, self.held_out_report = self._prepared(self.own.held_out, tokenizer)
            # a first token is not predicted, and may be all that a row had to learn
            self.held_out = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
            if not self.held_out:
                raise AdapterError(f"the held-out rows, {self.own.parted}, hold nothing to predict.")
            answers = [last_answer(row) for row in self.held_out]
            self.prompts = [prompt for prompt, _ in answers]
            self.texts = [tokenizer.batch_decode(each, skip_special_tokens=True) for each in zip(*answers, strict=True)]
        return model, tokenizer

    def rows(self) -> int:
        return len(self.held_out)

    def prompt(self, row: int) -> str:
        text = " ".join(self.texts[0][row].split())
        return text if len(text) <= _SHOWN else f"…{text[-_SHOWN:]}"

    def reference(self, row: int) -> str:
        return str(self.texts[1][row])

    def example(self, tokenizer: Any) -> str:
        rows, _ = self._prepared(self.own.training, tokenizer)
        return str(tokenizer.decode(rows[0]["input_ids"]))

    def trainer(self, model: Any, tokenizer: Any, folder: str) -> Any:
        from trl import SFTConfig

        from adapters.train.instruction import InstructionTrainer
        from adapters.train.sft import SFTTrainer
        from adapters.train.steps import settings, show_steps

        training = self.recipe.training
        text = recognise(self.own.training, self.how["columns"]).shape.name == "text"
        trainer = (SFTTrainer if text else InstructionTrainer)(
            model,
            SFTConfig(**settings(training, folder), max_length=training.max_tokens),
            train_dataset=self.own.training,
            eval_dataset=self.own.held_out if training.eval_steps is not None else None,
            processing_class=tokenizer,
            layout=training.layout,
            preflight=False,  # the recipe's own comes before
            **self.how,
        )
        show_steps(trainer, self.console)
        self._report(trainer)
        return trainer

    def _report(self, trainer: Any) -> None:
        """Says what the rows are and how they are laid out, and keeps it for the adapter's record."""
        again = shared(trainer.train_dataset, self.held_out)
        lines = [
            str(trainer.data),
            f"held out: {self.own.parted}; {_kept(self.held_out_report)}",
            f"rows of a forward: {trainer.packing.kind} ({trainer.packing.reason})",
        ]
        if again:
            lines.append(f"note: {again:,} held-out rows occur in training too, and say little about other rows")
        self.console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        self.facts |= {"rows": _brief(trainer.data), "held_out_rows": _brief(self.held_out_report)}
        self.facts |= {"held_out_in_training": again, "layout": trainer.packing.kind}

    def trained(self, trainer: Any, learned: int) -> Trained:
        return Trained(int(trainer.state.num_input_tokens_seen), learned)

    def base_answers(self, model: Any, tokenizer: Any, advance: Advance) -> list[Answer]:
        return self.answers(model, tokenizer, range(self.rows()), advance)

    def answers(self, model: Any, tokenizer: Any, rows: Sequence[int], advance: Advance) -> list[Answer]:
        """Losses of all the rows, and texts of those that are printed."""
        found = losses(model, [self.held_out[row] for row in rows], advance)
        settings = self.recipe.evaluation
        written = [row for row in rows if row < settings.examples]
        prompts = [self.prompts[row] for row in written]
        ids = generate(model, tokenizer, prompts, settings.max_new_tokens, settings.batch)
        texts = dict(zip(written, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True))
        return [
            Answer(texts.get(row, ""), {"loss": loss.total / loss.tokens}, loss.tokens)
            for row, loss in zip(rows, found, strict=True)
        ]

    def logits(self, model: Any, tokenizer: Any, rows: Sequence[int]) -> Tensor:
        return learned_logits(model, [self.held_out[row] for row in rows])

    def _prepared(self, rows: Any, tokenizer: Any) -> tuple[list[dict[str, Any]], DataReport]:
        made = prepare(rows, tokenizer, max_tokens=self.recipe.training.max_tokens, **self.how)
        return list(made.dataset), made.report


def _kept(report: DataReport) -> str:
    dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in report.dropped.items())
    return f"{report.kept:,} kept with {report.learned_tokens:,} learned tokens{dropped}"


def _brief(report: DataReport) -> dict[str, Any]:
    """All of a report but the lists with an entry for every row."""
    return {key: value for key, value in asdict(report).items() if key not in ("lengths", "learned")}
