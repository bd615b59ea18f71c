"""Laws 1 to 11 on the real SmolLM2-135M-Instruct and MiniLM, in fp32, bf16 and nf4."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import LAWS, Case, output, relative
from test_laws import OPTIONS
from torch import nn

import adapters

pytestmark = [pytest.mark.real, pytest.mark.slow]
TEXTS = ["The capital of France is", "def add(a, b):\n    return", "Water boils at one hundred degrees and"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# every law runs once per method; precisions rotate, so that each method meets each of them on one of the two models
PRECISIONS = {
    "smollm2-135m-instruct": {
        "lora": "bf16",
        "qlora": "nf4",
        "dora": "bf16",
        "ia3": "fp32",
        "pfeiffer": "bf16",
        "parallel": "fp32",
        "prefix": "bf16",
    },
    "minilm-l6-v2": {
        "lora": "fp32",
        "rslora": "bf16",
        "qlora": "nf4",
        "patterns": "fp32",
        "dora": "nf4",
        "ia3": "nf4",
        "houlsby": "nf4",
        "prefix": "fp32",
        "loha": "nf4",
    },
}


@cache
def loaded(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    model, tokenizer = adapters.load_base(name, dtype=dtype)
    return model.eval(), tokenizer


def base(name: str, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(loaded(name, dtype)[0])


def inputs(name: str) -> dict[str, torch.Tensor]:
    tokenizer = loaded(name, torch.bfloat16)[1]
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def cases() -> list[Any]:
    found = []
    for name, chosen in PRECISIONS.items():
        for label, precision in chosen.items():
            found.append(pytest.param(name, label, precision, id=f"{name}-{label}-{precision}"))
    return found


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("name", "label", "precision"), cases())
def test_law(name: str, label: str, precision: str, law: Callable[[Case, Path], None], tmp_path: Path) -> None:
    method, options = OPTIONS[label]
    dtype = DTYPES.get(precision, torch.bfloat16)
    case = Case(partial(base, name, dtype), inputs(name), method, options, dtype, precision == "nf4", noise=0.04)
    law(case, tmp_path / "adapter")


def test_a_prefix_starts_as_a_real_prompt() -> None:
    name = "smollm2-135m-instruct"
    model, tokenizer = base(name, torch.float32), loaded(name, torch.float32)[1]
    text = "Answer in French. The French word for cat is chat; for dog it is"
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = tokenizer(" chien; for house it is", return_tensors="pt", add_special_tokens=False)["input_ids"]
    together = {"input_ids": torch.cat([prompt, ids], 1)}
    expected = output(model, together)[:, prompt.shape[1] :]
    report = adapters.attach(model, "prefix", text=text, tokenizer=tokenizer)
    assert f"text of {prompt.shape[1]} tokens" in str(report)
    found = output(model, {"input_ids": ids})
    assert relative(found, expected) < 1e-4


def test_a_merged_nf4_base_is_within_two_percent_in_bf16() -> None:
    name = "smollm2-135m-instruct"
    case = Case(
        partial(base, name, torch.bfloat16),
        inputs(name),
        "qlora",
        {"rank": 4, "alpha": 6.0},
        torch.bfloat16,
        True,
        0.02,
    )
    model = case.shaken()
    adapted = output(model, case.inputs)
    certificate = adapters.merge(model, "fr", example=case.inputs)
    merged = output(model, case.inputs)
    assert relative(merged, adapted) < 2e-2 < certificate.effect
