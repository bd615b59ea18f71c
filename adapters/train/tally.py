"""Sums over the labelled tokens of many batches, for the numbers that are logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adapters.train.loss import Scored


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
