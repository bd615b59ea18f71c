"""Small tokenizers and chat templates as they are found in the field, each written for these tests."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|endoftext|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 2: brackets around the user, contents trimmed, a space before the answer, tokens at both ends of an exchange
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Gemma: the assistant is called model, contents are trimmed, no system turn, roles must alternate
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Qwen 3: thinking is dropped from answers before the last question, and the last answer always shows some
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}<think>{{ parts[0].replace('<think>', '') if parts | length > 1 }}</think>{% endif %}"
    "{{ parts[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Phi 3: a token after every turn, and another one at the end of the conversation
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def letters(template: str | None, prefix: bool = False, **special: str | None) -> Any:
    """A tokenizer of single bytes, or of letters with SentencePiece's space before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if prefix:
        alphabet = ["▁", *map(chr, range(33, 127)), "\n"]
    model = models.BPE({token: i for i, token in enumerate(alphabet)}, [])
    tokenizer = Tokenizer(model)
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, template, special)


def words(template: str | None, texts: list[str], **special: str | None) -> Any:
    """A byte-level BPE trained on `texts`, whose merges may span what a template joins."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return _wrapped(tokenizer, template, special)


def _wrapped(tokenizer: Tokenizer, template: str | None, special: dict[str, str | None]) -> Any:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **special}
    others = [token for token in SPECIAL if token not in named.values()]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=others, **named)
    wrapped.chat_template = template
    return wrapped
