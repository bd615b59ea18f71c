"""One training step: forward with labels, backward, AdamW. Losses must agree pair by pair.

Measured: what one step costs and what autograd keeps for it, with the same tensors, batch and optimizer. Not measured:
data loading, the trainer around the step, gradient checkpointing, memory that is not kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import adapters
from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import LORA, NAME, Setting, close, prefix_twins, shake, twins

# bf16 has 8 bits of precision and the two sides round at different places; AdamW's first steps amplify signs
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def _side(model: Any, batch: dict[str, Any]) -> Side:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> float:
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Side(step, own=_storages(model))


def _storages(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return (*model.parameters(), *model.buffers())


def _step(setting: Setting, dtype: torch.dtype, method: str, nf4: bool = False, **options: Any) -> Pair:
    ours, theirs = twins(setting, dtype, method, nf4=nf4, **options)
    batch = setting.batch(ours)
    return Pair(_side(ours, batch), _side(theirs, batch), close(TOLERANCE[dtype]))


def _prefix(setting: Setting) -> Pair:
    """PEFT passes its prefix as a key-value cache and ours goes past it; keys, values and positions are the same."""
    ours, theirs = prefix_twins(setting, torch.float32, length=16)
    batch = setting.batch(ours)
    return Pair(_side(ours, batch), _side(theirs, batch), close(TOLERANCE[torch.float32]))


def _bottleneck(setting: Setting) -> Pair:
    """PEFT has no bottleneck layers: beside it stands the bare base, with gradients for its activations alone."""
    ours, base = setting.base(torch.float32).train(), setting.base(torch.float32).train()
    adapters.attach(ours, "bottleneck", name=NAME)
    shake(ours)
    batch = setting.batch(ours)
    for parameter in base.parameters():
        parameter.requires_grad_(False)

    def bare() -> float:
        embedded = base.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        loss = base(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["input_ids"]).loss
        loss.backward()
        return float(loss.detach())

    return Pair(_side(ours, batch), Side(bare, own=_storages(base)))


def _row(name: str, build: Callable[[Setting], Pair], **kinds: Any) -> Row:
    return Row(f"train step, {name}", build, units=("CPU ms", "saved MiB"), **kinds)


ROWS = [
    _row("LoRA r16, fp32", partial(_step, dtype=torch.float32, method="lora", **LORA)),
    _row("LoRA r16, bf16", partial(_step, dtype=torch.bfloat16, method="lora", **LORA)),
    _row(
        "LoRA r16, nf4 base (QLoRA)",
        partial(_step, dtype=torch.bfloat16, method="lora", nf4=True, **LORA),
        needs=("bitsandbytes",),
    ),
    _row("DoRA r16, fp32", partial(_step, dtype=torch.float32, method="dora", **LORA)),
    _row("IA3, fp32", partial(_step, dtype=torch.float32, method="ia3")),
    _row("prefix 16, fp32", _prefix),
    _row("bottleneck, fp32", _bottleneck, peer="bare base", gated=False, most_pairs=3),
]
