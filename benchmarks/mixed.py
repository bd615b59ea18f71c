"""One batch whose 32 rows use 32 adapters: 64 tokens at once, and then one more with a cache. fp32, no gradients.

Every row of ours must equal that adapter's separate run to 1e-5, which is checked once, and PEFT's `adapter_names=` to
1e-4 in every pair. The head runs on the last token, as in generation. PEFT can mix LoRA and its like; for bottleneck
layers and prefixes it ignores the request, so that only the bare base stands beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import adapters
from benchmarks.fleet import fleet
from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import Setting, bare, close

Forward = Callable[..., Any]


def _ours(model: Any, names: list[str]) -> Forward:
    def forward(**batch: Any) -> Any:
        with adapters.using(model, names):
            return model(**batch)

    return forward


def _theirs(model: Any, names: list[str]) -> Forward:
    return partial(model, adapter_names=names)


class Work:
    """The two halves of a generation for a whole batch: the prompt, and one token after it."""

    def __init__(self, setting: Setting, model: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (setting.mixed, setting.prompt + 1)
        self.ids = torch.randint(5, int(model.config.vocab_size), shape, generator=generator)

    @torch.no_grad()
    def prefill(self, forward: Forward, rows: slice = slice(None)) -> Any:
        ids = self.ids[rows, :-1]
        return forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode(self, forward: Forward, cache: Any, rows: slice = slice(None)) -> Any:
        ids = self.ids[rows]
        batch = {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids)}
        return forward(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def both(self, forward: Forward, rows: slice = slice(None)) -> Tensor:
        """Logits of the last prompt token and of the one after, (rows, 2, vocabulary)."""
        first = self.prefill(forward, rows)
        return torch.cat([first.logits, self.decode(forward, first.past_key_values, rows).logits], 1)


def require_separate_runs_agree(work: Work, model: Any, names: list[str]) -> None:
    """Law 13: each row of the mixed batch is what its adapter computes alone."""
    mixed = work.both(_ours(model, names))
    alone = [work.both(_ours(model, names[i]), slice(i, i + 1)) for i in range(len(names))]  # type: ignore[arg-type]
    for row, expected in zip(mixed, alone, strict=True):
        close(1e-5)(row, expected[0])
    assert float((mixed[0] - mixed[1]).norm()) > 0, "rows are alike"


def _mixed(setting: Setting, method: str, phase: str, peer: str) -> Pair:
    found = fleet(setting, method, setting.adapters if method == "lora" else setting.mixed)
    names = [str(i) for i in range(setting.mixed)]
    work = Work(setting, found.ours)
    require_separate_runs_agree(work, found.ours, names)
    ours = _ours(found.ours, names)
    theirs = _theirs(found.theirs, names) if peer == "PEFT" else bare(setting)

    def side(forward: Forward) -> Side:
        if phase == "prefill":
            return Side(partial(work.prefill, forward), after=lambda output: output.logits)
        held: dict[str, Any] = {}
        cache = work.prefill(forward).past_key_values

        def before() -> None:
            held["cache"] = copy.deepcopy(cache)

        return Side(lambda: work.decode(forward, held["cache"]), before, lambda output: output.logits)

    agree = close(1e-4) if peer == "PEFT" else _differ
    return Pair(side(ours), side(theirs), agree)


def _differ(ours: Tensor, base: Tensor) -> None:
    assert ours.shape == base.shape
    assert float((ours - base).norm() / base.norm()) > 1e-3, "the adapters do nothing"


def _row(method: str, phase: str, peer: str) -> Row:
    label = {"lora": "LoRA r8", "bottleneck": "bottleneck", "prefix": "prefix 16"}[method]
    what = {"prefill": "64 tokens", "decode": "one token more"}[phase]
    build = partial(_mixed, method=method, phase=phase, peer=peer)
    kinds: dict[str, Any] = {"most_pairs": 3 if phase == "prefill" else 7}
    if peer == "bare base":
        kinds |= {"limit": 1.6, "gated": method == "lora"}
    return Row(f"32 rows, 32 adapters, {label}, {what}", build, peer=peer, **kinds)


ROWS = [
    *(_row("lora", phase, peer) for phase in ("prefill", "decode") for peer in ("bare base", "PEFT")),
    *(_row(method, phase, "bare base") for method in ("bottleneck", "prefix") for phase in ("prefill", "decode")),
]
