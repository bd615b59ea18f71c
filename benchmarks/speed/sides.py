"""Steps of the trainers: ours, and TRL's with PEFT's model under the settings that may be fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adapters.data.tokens import IGNORED
from benchmarks.speed.cases import Case, Rows
from benchmarks.trainers import PLAIN, classifier_trainer, made
from benchmarks.twins import Setting, twins


@dataclass
class Side:
    """One trainer with its model; `step` makes a whole step, with AdamW at a rate of 0, and returns the loss."""

    name: str
    trainer: Any
    model: Any
    rows: Rows
    around: Callable[[], Any] = contextlib.nullcontext

    @property
    def switched(self) -> bool:
        """With what no setting of TRL's chooses on a CPU."""
        return self.around is _labelled_only

    def __post_init__(self) -> None:
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.0, weight_decay=0.0)

    @property
    def learned(self) -> int:
        """Labelled tokens of the rows, or labelled rows."""
        if "label" in self.rows[0]:
            return len(self.rows)
        return sum(label != IGNORED for row in self.rows for label in row["labels"][1:])

    def batch(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = self.trainer._prepare_inputs(self.trainer.data_collator([dict(r) for r in self.rows]))
        return made

    def gradients(self) -> float:
        """Forward and backward; the gradients stay."""
        self.optimizer.zero_grad()
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = 1  # which a trainer's loop sets
        with self.around():
            loss = self.trainer.training_step(self.trainer.model, self.batch(), torch.tensor(self.learned))
        return float(loss)

    def step(self) -> float:
        loss = self.gradients()
        self.optimizer.step()
        return loss

    def by_site(self) -> dict[str, Tensor]:
        """Gradients by the path of the weight and the factor, for ours and PEFT's names alike."""
        found = {}
        for name, p in self.trained.items():
            assert p.grad is not None, name
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            path = path.replace(".modules_to_save.default", "")
            if ".adapters." in path:
                path, _, factor = path.partition(".adapters.")
                factor = factor.rpartition(".")[2]
            elif ".lora_" in path:
                path, _, factor = path.partition(".lora_")
                factor = factor[:1].lower()
            else:  # of a head
                path, _, factor = path.rpartition(".")
            found[f"{path} {factor}"] = p.grad.float()
        return found


def sides(case: Case, setting: Setting) -> tuple[Side, list[Side], list[Side]]:
    """(ours, TRL's under each setting, TRL's by default): equal tensors, rows and labels."""
    import trl

    import adapters.train

    rows = case.rows()
    base = Setting(base=case.base, scratch=setting.scratch)
    ours, theirs = twins(base, case.dtype, "lora", nf4=case.nf4, **_lora(case))
    if case.classifies:
        return _classifying(ours, theirs, rows, setting)
    trainer = made(adapters.train.SFTTrainer, ours, rows, setting.folder("ours"), **PLAIN)
    mine = Side("ours", trainer, ours, rows)
    peers = []
    for name, free, compact in (
        ("padded", False, False),
        ("padding-free", True, False),
        ("padded, labelled rows", False, True),
        ("padding-free, labelled rows", True, True),
    ):
        theirs_trainer = made(trl.SFTTrainer, theirs, rows, setting.folder("theirs"), padding_free=free, **PLAIN)
        peers.append(Side(name, theirs_trainer, theirs, rows, _labelled_only if compact else contextlib.nullcontext))
    return mine, peers, [_by_default(case, base, rows)] if case.defaults else []


def _classifying(ours: Any, theirs: Any, rows: Rows, setting: Setting) -> tuple[Side, list[Side], list[Side]]:
    """transformers' Trainer on both sides, on ours after `adapters.train.unpad(model)`."""
    from adapters.train import unpad

    found = unpad(ours)
    assert found.spared, found
    both = [
        Side(name, classifier_trainer(model, rows, setting.folder(name)), model, rows)
        for name, model in (("ours", ours), ("padded", theirs))
    ]
    return both[0], both[1:], []


def _lora(case: Case) -> dict[str, Any]:
    return {"rank": case.rank, "alpha": 2.0 * case.rank}


def _by_default(case: Case, setting: Setting, rows: Rows) -> Side:
    """What `SFTConfig(folder)` does: autocast to bf16, checkpointing, padded rows, the head on all tokens."""
    import trl

    _, theirs = twins(setting, case.dtype, "lora", nf4=case.nf4, **_lora(case))
    trainer = made(trl.SFTTrainer, theirs, rows, setting.folder("default"))
    if trainer.args.gradient_checkpointing:
        theirs.enable_input_require_grads()
        theirs.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model = trainer.accelerator.prepare_model(theirs)
    return Side("TRL's defaults", trainer, theirs, rows)


@contextlib.contextmanager
def _labelled_only() -> Iterator[None]:
    """TRL scores labelled rows alone where it has Triton; nothing but this switch keeps it from doing so on a CPU."""
    with mock.patch("trl.trainer.utils._use_triton", return_value=True):
        yield
