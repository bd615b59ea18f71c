"""Forwards without gradients: an adapter at work, decoding with a cache, and what an adapter costs while it is off.

Outputs must agree, and an adapter that is on must change them. Not measured: sampling, batching, loading.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import adapters
from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import LORA, NAME, Setting, close, saved, twins

NEW_TOKENS = 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _logits(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**batch).logits
        return found

    return forward


def _adapted(setting: Setting, dtype: torch.dtype) -> Pair:
    ours, theirs = twins(setting, dtype, "lora", train=False, **LORA)
    batch = setting.batch(ours)
    with adapters.using(ours, None):
        base = _logits(ours, batch)()

    def check(a: Tensor, b: Tensor) -> None:
        close(TOLERANCE[dtype])(a, b)
        assert float((a - base).norm() / base.norm()) > 0.01, "the adapter does nothing"

    return Pair(Side(_logits(ours, batch)), Side(_logits(theirs, batch)), check)


def _decode(setting: Setting) -> Pair:
    ours, theirs = twins(setting, torch.float32, "lora", train=False, **LORA)
    prompt = {key: value[:1, :16] for key, value in setting.batch(ours).items()}
    fixed = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def decode(model: Any) -> list[int]:
        found: list[int] = model.generate(**prompt, **fixed)[0].tolist()
        return found

    def check(a: list[int], b: list[int]) -> None:
        assert a == b, "the two sides generated different tokens"
        assert len(a) == prompt["input_ids"].shape[1] + NEW_TOKENS

    return Pair(Side(partial(decode, ours)), Side(partial(decode, theirs)), check)


def _off(setting: Setting) -> Pair:
    """Entering `using(model, None)` and PEFT's `disable_adapter()` are part of it."""
    ours, theirs = twins(setting, torch.float32, "lora", train=False, **LORA)
    batch = setting.batch(ours)

    def run_ours() -> Tensor:
        with adapters.using(ours, None):
            return _logits(ours, batch)()

    def run_theirs() -> Tensor:
        with theirs.disable_adapter():
            return _logits(theirs, batch)()

    return Pair(Side(run_ours), Side(run_theirs), close(0.0))


def _off_beside_the_base(setting: Setting) -> Pair:
    ours, base = setting.base(torch.float32), setting.base(torch.float32)
    adapters.load(ours, saved(setting, ours, "off", "lora", **LORA), name=NAME, activate=False)
    batch = setting.batch(ours)
    return Pair(Side(_logits(ours, batch)), Side(_logits(base, batch)), close(0.0))


ROWS = [
    Row("forward, LoRA r16, fp32", partial(_adapted, dtype=torch.float32)),
    Row("forward, LoRA r16, bf16", partial(_adapted, dtype=torch.bfloat16)),
    Row(f"decode {NEW_TOKENS} tokens, LoRA r16, fp32", _decode),
    Row("forward, adapter off, fp32", _off),
    Row("forward, adapter off, fp32", _off_beside_the_base, peer="bare base", gated=False),
]
