"""Greedy answers to many prompts, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Prompt = Sequence[int]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch: int = 10,
    hopeless: Callable[[str], bool] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the end-of-turn token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: longest continuation, in tokens.
        batch: prompts that run together; prompts of similar length do, so that little is padding.
        hopeless: says of the text so far that its score can no longer change; such a row ends early.
        advance: called with the number of prompts just answered.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        replies = _one_batch(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, hopeless)
        for i, ids in zip(chosen, replies, strict=True):
            answers[i] = ids
        advance(len(chosen))
    return answers


@torch.no_grad()
def _one_batch(
    model: Any, tokenizer: Any, prompts: list[Prompt], longest: int, hopeless: Callable[[str], bool] | None
) -> list[list[int]]:
    width = max(map(len, prompts))
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def ended(sequences: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
        return torch.tensor([hopeless is not None and hopeless(text) for text in texts], device=sequences.device)

    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=pad,
        stopping_criteria=[ended] if hopeless is not None else None,
    )
    rows: list[list[int]] = out[:, width:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
