"""What the loops learn: rows that repeat themselves, and a preference for a few words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast

IGNORED = -100
LIKED = range(20, 36)  # the tokens that preferences are for; a tenth of the vocabulary
ROWS = 8
END = 2  # the tokenizer's end of text: without it generation would not stop, and trainers may refuse the rows


def tokenizer() -> Any:
    """One word a token, w7 is token 7; the special tokens are those of the tiny models."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, tiny.VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def documents() -> list[dict[str, list[int]]]:
    """Rows of unequal lengths: a first token, two that take turns, and the end. The first three are not learned."""
    made = []
    for i in range(ROWS):
        first, one, other = 10 + i, 40 + 7 * i, 100 + 3 * i
        ids = [first, *([one, other] * 6)[: 6 + i % 5], END]
        made.append({"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]})
    return made


def padded(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows below each other."""
    longest = max(len(row["input_ids"]) for row in batch)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
    return {"input_ids": fill("input_ids", 0), "attention_mask": torch.tensor(mask), "labels": fill("labels", IGNORED)}


def collator(rows: str) -> Any:
    """For rows below each other, or one after the other with positions that restart (transformers' own)."""
    return padded if rows == "padded" else DataCollatorWithFlattening()


def preferences(kind: str) -> Any:
    """Texts of liked words against texts of others, in the columns that a trainer of this kind reads."""
    numbers, made = random.Random(1), []
    for i in range(2 * ROWS):
        good, bad = (" ".join(f"w{numbers.choice(those)}" for _ in range(4)) for those in (LIKED, range(36, 140)))
        prompt = " ".join(f"w{5 + i + j}" for j in range(2 + i % 3)) + " "
        if kind == "dpo":
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif kind == "kto":
            made.append({"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)})
        elif kind == "reward":
            made.append({"chosen": prompt + good, "rejected": prompt + bad})
        else:
            made.append({"prompt": prompt})
    return Dataset.from_list(made)


def liked(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """GRPO's reward: the share of a completion's tokens that are liked."""
    return [sum(token in LIKED for token in ids) / max(1, len(ids)) for ids in completion_ids]


def translations() -> Any:
    """Pairs of texts without a word in common, whose embeddings should be close."""
    return Dataset.from_list(
        [{"anchor": f"w{20 + i} w{30 + i} w{40 + i}", "positive": f"w{100 + i} w{120 + i}"} for i in range(2 * ROWS)]
    )
