"""A tiny chat model in a folder, rows of its own to learn, and recipes over both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import chat
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["north", "south", "east", "west", "apple", "pear", "plum", "fig", "river", "hill", "sea", "sky"]
RECIPE = """\
task: instruction
base: {base}
method: {{name: lora, rank: 4, dropout: 0.1}}
data: {{path: {data}, evaluation: 0.2}}
training: {{steps: 6, batch: 4, micro_batch: 2, learning_rate: 5.0e-3, warmup: 1, max_tokens: 128, save_steps: 2}}
evaluation: {{rows: 6, batch: 3, max_new_tokens: 6, examples: 2}}
output: {output}
"""


def base(folder: Path, template: str | None = chat.CHATML) -> Path:
    """A Llama of random weights with a tokenizer of single bytes."""
    tokenizer = chat.letters(template, eos_token="<|im_end|>", pad_token="<|im_end|>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special, num_key_value_heads=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int = 30, seed: int = 3) -> list[dict[str, Any]]:
    """Questions with unequal answers, each row once."""
    drawn = random.Random(seed)
    return [
        {
            "instruction": f"{i}: {' '.join(drawn.choices(WORDS, k=drawn.randrange(1, 5)))}?",
            "output": " ".join(drawn.choices(WORDS, k=drawn.randrange(1, 4))),
        }
        for i in range(count)
    ]


def lines(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def recipe(folder: Path, base: Path, data: Path) -> Path:
    """The recipe's file; its output is `folder/adapter`."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(base=base, data=data, output=folder / "adapter"))
    return path
