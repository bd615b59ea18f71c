"""What a step is measured on: rows, and bases of several kinds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import adapters
from adapters.data.tokens import IGNORED
from benchmarks.twins import smollm2

Rows = list[dict[str, Any]]
SEED = 0


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        base: makes a base of its own in a dtype.
        rows: makes the rows of one micro-batch.
        nf4: the base is quantised.
        defaults: TRL's own defaults are measured as well.
        classifies: the base is a classifier, the trainer transformers' own, and a row has one `label`.
    """

    name: str
    base: Callable[[torch.dtype], Any]
    rows: Callable[[], Rows]
    dtype: torch.dtype
    nf4: bool = False
    defaults: bool = False
    classifies: bool = False
    rank: int = 16


def calls(count: int = 8) -> Rows:
    """Function calling on real rows (BFCL), as the quickstart trains on them."""
    _, tokenizer = adapters.load_base("smollm2-135m-instruct", dtype=torch.bfloat16)
    training, _ = adapters.data.read_calls()
    chosen = random.Random(SEED).sample(training, count)
    encoded = [adapters.data.encode_call(tokenizer, call) for call in chosen]
    return [{"input_ids": list(each.input_ids), "labels": list(each.labels)} for each in encoded]


def sums(count: int = 8) -> Rows:
    """As long as GSM8K's: prompts and answers of about 100 tokens each, log-normal, cut from the text of `calls`.

    Random tokens will not do: on them, gradients in bf16 are off by 83 % on SmolLM2, TRL's like ours.
    """
    numbers, made = random.Random(SEED), []
    text = [token for row in calls(4 * count) for token in row["input_ids"]]
    for _ in range(count):
        prompt = min(260, max(50, round(numbers.lognormvariate(4.6, 0.3))))
        answer = min(300, max(30, round(numbers.lognormvariate(4.6, 0.45))))
        start = numbers.randrange(len(text) - prompt - answer)
        ids = text[start : start + prompt + answer]
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


def headlines(count: int = 32) -> Rows:
    """Headlines to be told sarcastic or sincere, as `recipes/sarcasm.yaml` trains on them."""
    training, _ = adapters.data.headlines.read_headlines(2000)
    _, tokenizer = adapters.load_base("minilm-l6-v2")
    chosen = random.Random(SEED).sample(training, count)
    return [{"input_ids": tokenizer(row.text)["input_ids"], "label": row.label} for row in chosen]


def minilm(dtype: torch.dtype) -> nn.Module:
    """A classifier of two kinds with a fresh head, without dropout, which would draw other numbers on either side."""
    torch.manual_seed(SEED)
    without: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: nn.Module
    model, _ = adapters.load_base("minilm-l6-v2", dtype=dtype, kind="classifier", num_labels=2, **without)
    return model


def drawn(config: Callable[[], Any], dtype: torch.dtype) -> nn.Module:
    """A causal language model of random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    model: nn.Module = AutoModelForCausalLM.from_config(config(), dtype=dtype)
    return model


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)  # 124 M


def qwen3() -> Any:
    from transformers import Qwen3Config

    sizes = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 49152}
    return Qwen3Config(num_attention_heads=12, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, **sizes)


def gemma3() -> Any:
    from transformers import Gemma3TextConfig

    sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "vocab_size": 49152}
    return Gemma3TextConfig(num_attention_heads=4, num_key_value_heads=1, head_dim=256, **sizes)


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 12, "vocab_size": 49152}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    return Qwen3MoeConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=64, **sizes, **experts)


FP32, BF16 = torch.float32, torch.bfloat16
CASES = [
    Case("SmolLM2, function calls, fp32", smollm2, calls, FP32, defaults=True),
    Case("SmolLM2, function calls, bf16", smollm2, calls, BF16, defaults=True),
    Case("SmolLM2, GSM8K-like, fp32", smollm2, sums, FP32),
    Case("SmolLM2, GSM8K-like, bf16", smollm2, sums, BF16),
    Case("SmolLM2, function calls, nf4 (QLoRA)", smollm2, calls, BF16, nf4=True),
    Case("MiniLM, headlines, fp32", minilm, headlines, FP32, classifies=True),
    *(
        Case(f"{name}, random weights, fp32", partial(drawn, config), partial(sums, 4), FP32)
        for name, config in (("GPT-2", gpt2), ("Qwen3", qwen3), ("Gemma 3", gemma3), ("Qwen3-MoE", qwen3_moe))
    ),
]
