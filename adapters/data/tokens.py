"""Conversations to token ids and labels, with exactly the answer learned."""

from __future__ import annotations

from typing import Any, NamedTuple

from adapters._errors import AdapterError
from adapters.data.calls import Call
from adapters.data.rendering import answer, messages

IGNORED = -100  # the label that torch's cross-entropy leaves out


class Encoded(NamedTuple):
    """Token ids of prompt and answer, and labels: -100 on the prompt, the answer's ids on the answer."""

    input_ids: list[int]
    labels: list[int]


def encode_prompt(tokenizer: Any, conversation: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer starts.

    Raises:
        AdapterError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise AdapterError("the base model's tokenizer has no chat template; use the instruct version of the model.")
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(tokenizer: Any, conversation: list[dict[str, str]], reply: str) -> Encoded:
    """Prompt and reply as they meet in generation: tokenised apart, so that no token spans both.

    The end of the turn is always learned. Labels are masked by position and not by token: the padding token may be
    the same one.
    """
    prompt = encode_prompt(tokenizer, conversation)
    learned = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Encoded(prompt + learned, [IGNORED] * len(prompt) + learned)


def encode_call(tokenizer: Any, call: Call) -> Encoded:
    """One function call with its reference answer."""
    return encode(tokenizer, messages(call), answer(call))
