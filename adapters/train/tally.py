"""Sums over the labelled tokens of many batches, for the numbers that are logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters.data.tokens import IGNORED
from adapters.train.loss import Scored


def without_repeats(accelerator: Any, batch: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
    """An evaluation batch without labels on the rows that accelerate repeats, so that every process has as many.

    Args:
        rows: in a full batch of one process.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    own = state.remainder - accelerator.process_index * rows  # of the last round, in the order of the processes
    labels, positions = batch["labels"], batch.get("position_ids")
    row = (
        torch.arange(len(labels), device=labels.device)[:, None]
        if positions is None
        else (positions == 0).cumsum(1) - 1
    )
    return {**batch, "labels": torch.where(row < own, labels, IGNORED)}


@dataclass(frozen=True)
class Tally:
    """Sums so far, those of all processes where `over_processes` made it."""

    total: float = 0.0  # cross-entropy, nats
    count: float = 0.0  # labelled tokens
    correct: float = 0.0
    entropy: float = 0.0  # nats

    def plus(self, scored: Scored) -> Tally:
        sums = (scored.total.detach(), scored.count, scored.correct, scored.entropy)
        new = torch.stack([each.float() for each in sums]).tolist()  # one transfer
        return Tally(*(old + value for old, value in zip(vars(self).values(), new, strict=True)))

    def over_processes(self, accelerator: Any) -> Tally:
        if accelerator.num_processes == 1:
            return self
        mine = torch.tensor(list(vars(self).values()), device=accelerator.device)
        return Tally(*accelerator.reduce(mine, "sum").tolist())

    @property
    def loss(self) -> float:
        """The mean over labelled tokens."""
        return self.total / self.count

    def metrics(self) -> dict[str, list[float]]:
        """Under the names, and in the form, in which TRL keeps what it logs."""
        return {"entropy": [self.entropy / self.count], "mean_token_accuracy": [self.correct / self.count]}
