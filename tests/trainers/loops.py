"""The loops. Each trains a model that `join` has adapted, and calls `ready` when all is made and nothing has begun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate import Accelerator
from torch.utils.data import DataLoader

import adapters
from adapters._bridge.face import PeftFace
from tests.trainers.bases import build
from tests.trainers.cases import Case
from tests.trainers.joining import NAME, Ours, Stock
from tests.trainers.material import collator, documents
from tests.trainers.trainers import MAKE, RATES, STEPS

Ready = Callable[[Any, Any], None]  # of the model and whatever may hold further ones


@dataclass
class Run:
    """A training that is over."""

    model: Any
    losses: list[float]
    rewards: list[float]  # GRPO's
    folder: Path  # the checkpoint
    adapter: Path  # the adapter's folder, in it or the same


def run(case: Case, side: Ours | Stock, place: Path, ready: Ready) -> Run:
    """One training, from a fresh base."""
    base = build(case)
    if case.checkpointing == "before":
        base.gradient_checkpointing_enable()
    given = side.join(base)
    model = given.pop("model", base)

    def start(trained: Any, holder: Any) -> None:
        side.ready(trained)
        ready(trained, holder)
        hf.set_seed(7)

    if case.loop in OWN:
        if case.checkpointing == "after":
            model.gradient_checkpointing_enable()
        if not isinstance(model, PeftFace) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # what PEFT wants of loops that do not know it
        return OWN[case.loop](case, model, place, start)
    trainer = MAKE[case.loop](case, model, place, given)
    start(trainer.model, trainer)
    trainer.train()
    logs = trainer.state.log_history
    losses, rewards = ([float(log[key]) for log in logs if key in log] for key in ("loss", "reward"))
    folder = place / f"checkpoint-{STEPS[case.loop]}"
    return Run(trainer.model, losses, rewards, folder, folder)


def _plain(case: Case, model: Any, place: Path, start: Ready) -> Run:
    rows, collate = documents(), collator(case.rows)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], RATES[case.method], weight_decay=0
    )
    start(model, None)
    model.train()
    losses = []
    for step in range(STEPS["plain"]):
        half = rows[:4] if step % 2 else rows[4:]
        loss = model(**collate(half), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    folder = place / "adapter"
    if isinstance(model, PeftFace):
        adapters.save(model, NAME, folder)
    return Run(model, losses, [], folder, folder)


def _accelerate(case: Case, model: Any, place: Path, start: Ready) -> Run:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], RATES[case.method], weight_decay=0
    )
    loader = DataLoader(documents(), batch_size=4, collate_fn=collator(case.rows))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    start(accelerator.unwrap_model(model), None)
    model.train()
    losses: list[float] = []
    while len(losses) < STEPS["accelerate"]:
        for batch in loader:
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    accelerator.save_state(str(place / "state"))
    return Run(accelerator.unwrap_model(model), losses, [], place / "state", place / "state" / "adapters")


OWN = {"plain": _plain, "accelerate": _accelerate}
