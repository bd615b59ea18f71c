"""The record of tokens whose rows train with an adapter."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN_TOKENS = "plain_tokens"  # the fact that names those that the tokenizer does not hold as special
ROWS = "tokens.rows"  # the name of an adapter's rows at a table; no tensor of a method can have a dot in its own


@dataclass(frozen=True)
class Tokens:
    """Tokens by ascending `ids`, with their `texts` ("" where no tokenizer told them), and the `tables` of their rows.

    A table is the path of a parameter `(vocabulary, width)`: the input embeddings', and the output embeddings' where
    that is another one. A tied one is named once, and its rows are the same at both ends.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    tables: tuple[str, ...]

    def __str__(self) -> str:
        return f"the rows of {self.named()} in {' and '.join(self.tables)}"

    def named(self) -> str:
        """The tokens with their ids, as a sentence lists them."""
        pairs = zip(self.ids, self.texts, strict=True)
        return ", ".join(f"{text!r} ({number})" if text else str(number) for number, text in pairs)

    def key(self, table: str) -> str:
        """The name of the rows of a table among an adapter's tensors."""
        return f"{table}:{ROWS}"
