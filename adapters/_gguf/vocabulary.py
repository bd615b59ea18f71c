"""Tokens that a model has and its base's GGUF file lacks: further entries of its lists, or names for empty ones.

As convert_hf_to_gguf.py writes them (get_vocab_base): special tokens are CONTROL, others USER_DEFINED, and rows that
no token belongs to are UNUSED and called [PAD<number>].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adapters._errors import AdapterError
from adapters._gguf.reading import GgufFile

TOKENS, KINDS, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
SPACE = "\u2581"  # which SentencePiece writes for a space
LAST = -1000.0  # the score of a token that no pieces are joined to


@dataclass(frozen=True)
class NewTokens:
    """What the lists of a base's file become: its own entries, some of them named now, and `added` further ones.

    Args:
        texts: of all tokens; None where nothing is new, and the file's stay as they are.
        kinds: gguf.TokenType of each.
        added: how many follow the file's own.
        named: of tokens that the file had no text for, or no entry.
    """

    texts: tuple[str, ...] | None = None
    kinds: tuple[int, ...] = ()
    added: int = 0
    named: tuple[str, ...] = ()

    def extended(self, key: str, value: Any, architecture: str) -> Any:
        """A field of the base's file with the new tokens in it."""
        if self.texts is None:
            return value
        if key == SCORES:
            return [*value, *([LAST] * self.added)]
        whole = {TOKENS: list(self.texts), KINDS: list(self.kinds), f"{architecture}.vocab_size": len(self.texts)}
        return whole.get(key, value)


def new_tokens(base: GgufFile, rows: int, tokenizer: Any) -> NewTokens:
    """The tokens of a model with `rows` rows that the base's file has not, or only as rows that nothing belongs to.

    Raises:
        AdapterError: there are some and no tokenizer says what they are, or it is of another base.
    """
    from gguf import TokenType

    known, kinds = list(base.field(TOKENS) or []), list(base.field(KINDS) or [])
    if not known or (tokenizer is None and rows <= len(known)):
        return NewTokens()
    if tokenizer is None:
        raise AdapterError(
            f"the model has {rows:,} tokens and {base.path.name} {len(known):,}: pass tokenizer=, which says what the "
            "new ones are."
        )
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    held = getattr(tokenizer, "added_tokens_decoder", {})
    fixed = {number: str(token) for number, token in held.items()}
    kinds += [int(TokenType.NORMAL)] * (len(known) - len(kinds))
    named, others = [], []
    for number in range(rows):
        if number >= len(known):
            known.append(f"[PAD{number}]")
            kinds.append(int(TokenType.UNUSED))
        text = texts.get(number)
        if not _empty(known[number], kinds[number]):
            others += [number] if number in fixed and known[number] != fixed[number].replace(" ", SPACE) else []
        elif text is not None and text != known[number]:
            special = getattr(held.get(number), "special", False)
            known[number], kinds[number] = text, int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
            named.append(text)
    added = len(known) - len(base.field(TOKENS))
    if not named and not added:
        return NewTokens()
    wrong = next((number for number in others if known[number] != fixed[number]), None)
    if wrong is not None:
        raise AdapterError(
            f"token {wrong} is {known[wrong]!r} in {base.path.name} and {fixed[wrong]!r} in the tokenizer: it is of "
            "another base."
        )
    return NewTokens(tuple(known), tuple(kinds), added, tuple(named))


def _empty(text: str, kind: int) -> bool:
    from gguf import TokenType

    return kind == TokenType.UNUSED or re.fullmatch(r"\[PAD\d+\]", text) is not None
