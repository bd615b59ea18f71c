"""TRL's SFTTrainer with the loss of `answer_loss`: summed over answer tokens, divided by those of the whole step."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from adapters.data.tokens import IGNORED
from adapters.train.loss import answer_loss, collate
from adapters.train.recipe import Training
from adapters.train.steps import settings, show_steps


class AnswerTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on finished columns. `learned` counts the labelled tokens that training went through."""

    learned: int = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the labelled tokens of the step, of which a micro-batch contributes its part."""
        count = (inputs["labels"][:, 1:] != IGNORED).sum()
        self.learned += int(count) if model.training else 0
        loss = answer_loss(model, inputs) / (count if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, tokens were summed
        return (loss, {}) if return_outputs else loss


def make_trainer(model: Any, tokenizer: Any, rows: Any, training: Training, folder: str, console: Console) -> Any:
    """A trainer over rows of `input_ids` and `labels` (a `datasets.Dataset`)."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    arguments = SFTConfig(**settings(training, folder), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = AnswerTrainer(
        model,
        arguments,
        data_collator=partial(collate, pad=pad),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    show_steps(trainer, console)
    return trainer
