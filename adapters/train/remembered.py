"""What a run counts and decides by, in a form that a checkpoint holds: a resumed run goes on with it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Learned(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Labelled tokens of the whole run, in all processes, those before it was resumed included.

    Args:
        trainer: whose `learned` counts those of this process since it started.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.before, self.tokens = trainer, 0, 0

    def state(self) -> dict[str, Any]:
        """As transformers writes it into a checkpoint."""
        return {"args": {}, "attributes": {"tokens": self.tokens}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__, {})
        self.before = self.tokens = stored.get("attributes", {}).get("tokens", 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._sum()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sum()

    def _sum(self) -> None:
        accelerator = self.trainer.accelerator
        here = torch.tensor(self.trainer.learned, device=accelerator.device)
        self.tokens = self.before + int(accelerator.reduce(here, "sum"))


class Patience(TrainerCallback):  # type: ignore[misc]
    """Ends training after so many evaluations without a lower loss; transformers' own forgets when it is resumed.

    Args:
        most: evaluations.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._lost(state):  # it died between the checkpoint and the end
            state.max_steps = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or self._lost(state)

    def _lost(self, state: Any) -> bool:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.most
