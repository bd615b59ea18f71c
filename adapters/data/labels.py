"""Pieces of text to token ids and labels, tokenised as generation meets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.data.tokens import IGNORED

_ANCHORS = ("\n", ":", "]", "a")


@dataclass(frozen=True)
class Piece:
    """A part of a row's text, and whether it is learned and ends a turn; `then` are tokens appended to it."""

    text: str
    learned: bool
    ends: bool = False
    then: tuple[int, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """Token ids, labels (-100 where nothing is learned), and the positions of the learned ends of turn.

    `together` tells whether tokenising the whole text at once gives the same ids.
    """

    input_ids: list[int]
    labels: list[int]
    ends: tuple[int, ...]
    together: bool

    def cut(self, length: int) -> Labelled:
        """The first `length` tokens."""
        ends = tuple(end for end in self.ends if end < length)
        return Labelled(self.input_ids[:length], self.labels[:length], ends, self.together)


@dataclass(frozen=True)
class Speller:
    """A tokenizer, with what it adds to a text by itself.

    Args:
        tokenizer: a transformers tokenizer.
        lead: special tokens that it puts before a text that no template has rendered.
        prefixes: whether it puts a space before every text (SentencePiece's dummy prefix), which only belongs at the
            start of a row.
    """

    tokenizer: Any
    lead: tuple[int, ...]
    prefixes: bool

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def ids_after(self, text: str) -> list[int]:
        """Ids of a text that continues another one."""
        if not self.prefixes or not text:
            return self.ids(text)
        for anchor in _ANCHORS:
            before, both = self.ids(anchor), self.ids(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.ids(text)


def speller(tokenizer: Any) -> Speller:
    """A `Speller` for a tokenizer, found by trying it on a letter."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    first = tokenizer.convert_ids_to_tokens(plain[:1])
    prefixes = bool(first) and str(first[0]).startswith(("▁", "Ġ"))  # SentencePiece, byte-level with a prefix space
    return Speller(tokenizer, tuple(whole[:start]), prefixes)


def label(speller: Speller, pieces: Sequence[Piece], rendered: bool) -> Labelled:
    """Ids and labels of a row, piece by piece, so that no token spans a prompt and its answer.

    Args:
        pieces: they add up to the text of the row.
        rendered: a chat template wrote the text, and with it every special token that belongs there.
    """
    pieces = [piece for piece in pieces if piece.text or piece.then]
    ids: list[int] = []
    labels: list[int] = []
    spelled: list[int] = []
    ends: list[int] = []
    for number, piece in enumerate(pieces):
        part = speller.ids(piece.text) if number == 0 else speller.ids_after(piece.text)
        if number == 0 and not rendered and tuple(part[: len(speller.lead)]) != speller.lead:
            ids += speller.lead
            labels += [IGNORED] * len(speller.lead)
        spelled += part
        part = [*part, *piece.then]
        ids += part
        labels += part if piece.learned else [IGNORED] * len(part)
        if piece.learned and piece.ends:
            ends.append(len(ids) - 1)
    together = spelled == speller.ids("".join(piece.text for piece in pieces))
    return Labelled(ids, labels, tuple(ends), together)
