"""The lesson `sarcasm`: an encoder with a fresh classification head learns to recognise sarcastic headlines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adapters._errors import AdapterError
from adapters._hub import load_base
from adapters._hub.pins import DATA, described
from adapters.data.headlines import LABELS, Headline, read_headlines
from adapters.train.lesson import Advance, Answer, Trained
from adapters.train.recipe import Recipe


class Sarcasm:
    """The rows of `read_headlines`, learned through transformers' Trainer and compared with the majority class."""

    baseline = "majority class"

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.training, self.held_out = read_headlines(recipe.evaluation.rows)
        self.facts: dict[str, Any] = {**described(DATA["sarcasm"]), "held_out": len(self.held_out)}

    def load(self, device: Any) -> tuple[Any, Any]:
        recipe = self.recipe
        torch.manual_seed(recipe.training.seed)  # of the fresh head
        names = dict(enumerate(LABELS))
        return load_base(
            recipe.base,
            recipe.quantize or recipe.method.quantize,
            recipe.dtype,
            device,
            kind="classifier",
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )

    def rows(self) -> int:
        return len(self.held_out)

    def prompt(self, row: int) -> str:
        return self.held_out[row].text

    def reference(self, row: int) -> str:
        return LABELS[self.held_out[row].label]

    def example(self, tokenizer: Any) -> str:
        return self.training[0].text

    def trainer(self, model: Any, tokenizer: Any, folder: str) -> Any:
        from datasets import Dataset
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        from adapters.train.steps import settings, show_steps
        from adapters.train.unpadding import unpad

        longest = self.recipe.training.max_tokens
        encoded = tokenizer([row.text for row in self.training])["input_ids"]
        kept = [
            {"input_ids": ids, "label": row.label}
            for ids, row in zip(encoded, self.training, strict=True)
            if len(ids) <= longest
        ]
        self.facts["training_rows"] = len(kept)
        if not kept:
            raise AdapterError(f"no headline has at most {longest} tokens; raise max_tokens.")
        self.facts["padding"] = str(unpad(model))
        trainer = Trainer(
            model,
            TrainingArguments(**settings(self.recipe.training, folder)),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=Dataset.from_list(kept),
            processing_class=tokenizer,
        )
        show_steps(trainer, self.console)
        return trainer

    def trained(self, trainer: Any, learned: int) -> Trained:
        """One label a row."""
        rows = trainer.state.global_step * self.recipe.training.batch
        return Trained(int(trainer.state.num_input_tokens_seen), rows)

    def base_answers(self, model: Any, tokenizer: Any, advance: Advance) -> list[Answer]:
        """The untrained head says nothing; what there is to beat is the label that training saw most often."""
        most, _ = Counter(row.label for row in self.training).most_common(1)[0]
        advance(self.rows())
        return [_answer(most, row) for row in self.held_out]

    def answers(self, model: Any, tokenizer: Any, rows: Sequence[int], advance: Advance) -> list[Answer]:
        said = self.logits(model, tokenizer, rows, advance).argmax(-1).tolist()
        return [_answer(label, self.held_out[row]) for label, row in zip(said, rows, strict=True)]

    @torch.no_grad()
    def logits(self, model: Any, tokenizer: Any, rows: Sequence[int], advance: Advance = lambda rows: None) -> Tensor:
        model.eval()
        size = self.recipe.evaluation.batch
        found = []
        for first in range(0, len(rows), size):
            chosen = rows[first : first + size]
            batch = tokenizer([self.held_out[row].text for row in chosen], padding=True, return_tensors="pt")
            found.append(model(**batch.to(model.device)).logits.float().cpu())
            advance(len(chosen))
        return torch.cat(found)


def _answer(label: int, row: Headline) -> Answer:
    return Answer(LABELS[label], {"correct": label == row.label})
