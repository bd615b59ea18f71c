"""Tokens that a model has and its base's GGUF file lacks: further entries of that file's lists.

As convert_hf_to_gguf.py writes them (get_vocab_base): special tokens are CONTROL, others USER_DEFINED, and rows that
no token belongs to are UNUSED and called [PAD<number>].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters._errors import AdapterError
from adapters._gguf.reading import GgufFile

TOKENS, KINDS, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
LAST = -1000.0  # the score of a token that no pieces are joined to


@dataclass(frozen=True)
class NewTokens:
    """Texts and kinds (gguf.TokenType) of the tokens numbered from `first` on."""

    first: int
    texts: tuple[str, ...]
    kinds: tuple[int, ...]

    def extended(self, key: str, value: Any, architecture: str) -> Any:
        """A field of the base's file with the new tokens in it."""
        count = len(self.texts)
        if not count:
            return value
        match key:
            case _ if key == TOKENS:
                return [*value, *self.texts]
            case _ if key == KINDS:
                return [*value, *self.kinds]
            case _ if key == SCORES:
                return [*value, *([LAST] * count)]
            case _ if key == f"{architecture}.vocab_size":
                return self.first + count
        return value


def new_tokens(base: GgufFile, rows: int, tokenizer: Any) -> NewTokens:
    """The tokens of a model with `rows` rows that the base's file has not.

    Raises:
        AdapterError: there are some, and no tokenizer says what they are.
    """
    known = base.field(TOKENS) or []
    if not known or rows <= len(known):
        return NewTokens(rows, (), ())
    if tokenizer is None:
        raise AdapterError(
            f"the model has {rows:,} tokens and {base.path.name} {len(known):,}: pass tokenizer=, which says what the "
            "new ones are."
        )
    from gguf import TokenType

    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if getattr(token, "special", False)}
    found, kinds = [], []
    for number in range(len(known), rows):
        text = texts.get(number)
        found.append(text if text is not None else f"[PAD{number}]")
        unused = text is None
        kind = TokenType.UNUSED if unused else TokenType.CONTROL if text in special else TokenType.USER_DEFINED
        kinds.append(int(kind))
    return NewTokens(len(known), tuple(found), tuple(kinds))
