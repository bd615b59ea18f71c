"""What the adapted model answers to real prompts, and what the merged one does: logits and generated text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters._errors import AdapterError
from adapters._evaluating import evaluating
from adapters._merge.certificate import PromptError, relative

PROMPTS = ("The capital of France is", "Water boils at", "def factorial(n):")
LONGEST = 24  # tokens of an answer


@dataclass(frozen=True)
class Answer:
    """A prompt's tokens, the greedy answer's, and the logits `(tokens, vocabulary)` of both."""

    prompt: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    logits: Tensor


def answers(model: nn.Module, tokenizer: Any, prompts: str | Sequence[str]) -> tuple[Answer, ...]:
    """What the model says now.

    Raises:
        AdapterError: there is no tokenizer, the model generates no text, or a prompt has no tokens of this model.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        return ()
    lacks = _lacks(model, tokenizer)
    if lacks:
        raise AdapterError(f"prompts need {lacks}: pass that, or leave them out.")
    return tuple(_answer(model, tokenizer, prompt) for prompt in prompts)


def usual(model: nn.Module, tokenizer: Any) -> tuple[str, ...]:
    """A few prompts, where there is who could answer."""
    return () if _lacks(model, tokenizer) else PROMPTS


def _lacks(model: nn.Module, tokenizer: Any) -> str:
    can_generate = getattr(model, "can_generate", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encodes or not callable(can_generate) or not can_generate():
        return "a decoder that generates text"
    return "a tokenizer=" if tokenizer is None else ""


def _answer(model: Any, tokenizer: Any, prompt: str) -> Answer:
    if not isinstance(prompt, str):
        raise AdapterError(f"prompts holds {prompt!r}, which is no text.")
    found = tokenizer(prompt)["input_ids"]
    known = model.get_input_embeddings().weight.shape[0]
    if not found or not all(isinstance(each, int) and 0 <= each < known for each in found):
        raise AdapterError(f"the prompt {prompt!r} has no tokens, or others than this model's {known:,}.")
    ids = tuple(found)
    answer = _generated(model, tokenizer, ids)
    return Answer(prompt, ids, answer, _logits(model, ids + answer))


def _generated(model: Any, tokenizer: Any, ids: tuple[int, ...]) -> tuple[int, ...]:
    from transformers import GenerationConfig

    row, own = torch.tensor([ids], device=model.device), getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    last = end[-1] if isinstance(end, list) else end
    pad = last if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # greedy, whatever the model's own settings are: both models are asked alike
    plain = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, eos_token_id=end, pad_token_id=pad)
    with evaluating(model), _without_settings(model):
        made = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=plain)
    return tuple(made[0, len(ids) :].tolist())


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """transformers fills a configuration that it is given from the model's own, which is set aside meanwhile."""
    from transformers import GenerationConfig

    held = "generation_config" in model.__dict__
    own = model.__dict__.get("generation_config")
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        if held:
            model.generation_config = own
        else:
            del model.generation_config


def _logits(model: Any, ids: tuple[int, ...]) -> Tensor:
    with evaluating(model):
        found: Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
    return found


def compared(model: nn.Module, tokenizer: Any, before: Sequence[Answer]) -> tuple[PromptError, ...]:
    """The merged model beside what the adapted one said: on its prompts, and on its answers, teacher-forced."""
    return tuple(_compared(model, tokenizer, each) for each in before)


def _compared(model: nn.Module, tokenizer: Any, before: Answer) -> PromptError:
    answer = _generated(model, tokenizer, before.ids)
    agreed = next(
        (i for i, (one, other) in enumerate(zip(before.answer, answer, strict=False)) if one != other),
        min(len(before.answer), len(answer)),
    )
    same = before.answer == answer
    top = before.logits[len(before.ids) - 1 + agreed].topk(2).values if not same else None
    return PromptError(
        before.prompt,
        adapted=tokenizer.decode(before.answer),
        merged=tokenizer.decode(answer),
        error=relative(_logits(model, before.ids + before.answer), before.logits),
        tokens=len(before.answer),
        agreed=agreed,
        margin=None if top is None else (top[0] - top[1]).item(),
    )
