"""The cases: a loop, a method, checkpointing, rows, a base and a way in which the adapter comes to the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product as combinations
from typing import Any

FACTORS: dict[str, tuple[str, ...]] = {
    "loop": ("trainer", "sft", "ours", "dpo", "kto", "grpo", "reward", "accelerate", "plain", "sentence"),
    "method": ("lora", "bottleneck", "prefix"),
    "checkpointing": ("off", "before", "after"),  # enabled before or after the adapter is attached
    "rows": ("padded", "packed"),
    "base": ("fp32", "nf4"),
    "join": ("attach", "config", "folder", "whole"),
}
NAMES = {
    "trainer": "transformers.Trainer",
    "sft": "trl.SFTTrainer",
    "ours": "adapters.train.SFTTrainer",
    "dpo": "trl.DPOTrainer",
    "kto": "trl.KTOTrainer",
    "grpo": "trl.GRPOTrainer",
    "reward": "trl.RewardTrainer",
    "accelerate": "a loop with accelerate",
    "plain": "a plain loop",
    "sentence": "SentenceTransformerTrainer",
}
JOINS = {
    "attach": "attached before the trainer is made (by `adapter=` in ours)",
    "config": "`peft_config=adapters.peft_config(...)`",
    "folder": "a saved adapter that goes on training",
    "whole": "attached to the SentenceTransformer instead of the transformer in it",
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 6.0},
    "bottleneck": {"reduction_factor": 8.0, "activation": "gelu"},
    "prefix": {"length": 8},
}
ONE_BASE = ("dpo", "kto", "grpo")


@dataclass(frozen=True)
class Case:
    """One value of each factor."""

    loop: str
    method: str
    checkpointing: str
    rows: str
    base: str
    join: str

    def __str__(self) -> str:
        return "/".join(astuple(self))

    @classmethod
    def of(cls, name: str) -> Case:
        return cls(*name.split("/"))


def why_not(case: Case) -> str:
    """Why there is no such case; empty where there is one."""
    if case.rows == "packed" and case.loop in _UNPACKED:
        return _UNPACKED[case.loop]
    if case.base == "nf4" and case.loop not in ("sft", "ours", "dpo"):
        return "4 bits are tried with SFT and DPO"
    if case.join == "config" and case.loop in ("trainer", "accelerate", "plain", "sentence"):
        return "the loop takes no `peft_config`"
    if case.join == "whole" and case.loop != "sentence":
        return "the model has no model in it"
    return ""


def product() -> list[Case]:
    """Every case that there is, in the order of the factors."""
    return [case for case in every() if not why_not(case)]


def every() -> Iterator[Case]:
    """Every combination, those that are not applicable among them."""
    for values in combinations(*FACTORS.values()):
        yield Case(*values)


_UNPACKED = {
    "dpo": "TRL's DPOTrainer has no packing, and switches `padding_free` off with a warning",
    "kto": "TRL's KTOTrainer has no packing",
    "grpo": "GRPO's rows are generated, and TRL pads them",
    "reward": "a reward is read at the end of a row, and TRL's RewardTrainer has no packing",
    "sentence": "a text is a row: its embedding is pooled over it",
}
assert [field.name for field in fields(Case)] == list(FACTORS)
