"""What preparing a data set found, assumed and left out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DataReport:
    """The facts of one `prepare`.

    Args:
        shape: name of the recognised shape.
        columns: field of the shape -> column it was read from.
        parts: column -> what it became, such as "user".
        unused: columns that were not read.
        roles: role name in the rows -> role for the template, where the two differ.
        rows: how many were read.
        kept: how many are left to train on.
        cut: how many of those were cut to `max_tokens`.
        dropped: reason -> rows.
        tokens: of all kept rows.
        learned_tokens: of those, how many have a label.
        lengths: tokens of each kept row.
        learned: labelled tokens of each kept row.
        learns: in words, what has labels.
        end_of_turn: text of the token that ends an answer; empty where that is not known.
        end_of_turn_id: its id, or None.
        ended: rows in which an end of turn is learned.
        proof: how it was shown that labels are where answers are.
        apart: rows that tokenise differently as one text than as generation meets them.
        assumed: whatever was assumed, one sentence each.
    """

    shape: str
    columns: Mapping[str, str]
    parts: Mapping[str, str]
    unused: tuple[str, ...]
    roles: Mapping[str, str]
    rows: int
    kept: int
    cut: int
    dropped: Mapping[str, int]
    tokens: int
    learned_tokens: int
    lengths: tuple[int, ...]
    learned: tuple[int, ...]
    learns: str
    end_of_turn: str
    end_of_turn_id: int | None
    ended: int
    proof: str
    apart: int
    assumed: tuple[str, ...]

    @property
    def share(self) -> float:
        """Learned tokens among all, from 0 to 1."""
        return self.learned_tokens / self.tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest kept row."""
        return max(self.lengths)

    def __str__(self) -> str:
        dropped = "".join(f"\n  dropped {count:,}: {reason}" for reason, count in self.dropped.items())
        roles = f"\nroles: {_pairs(self.roles)}" if self.roles else ""
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        assumed = "".join(f"\nnote: {sentence}" for sentence in self.assumed)
        return (
            f"shape: {self.shape}; {_pairs(self.parts)}{unused}{roles}\n"
            f"rows: {self.rows:,} read, {self.kept:,} kept, {self.cut:,} cut, "
            f"{sum(self.dropped.values()):,} dropped{dropped}\n"
            f"tokens: {self.tokens:,}, of which {self.learned_tokens:,} are learned ({self.share:.1%}): {self.learns}\n"
            f"length of a row: median {statistics.median(self.lengths):,.0f} tokens, longest {self.longest:,}\n"
            f"end of turn: {self._end()}\n"
            f"proof: {self.proof}\n"
            f"tokens as in generation, prompt and answer apart: {self.apart:,} rows would differ as one text{assumed}"
        )

    def _end(self) -> str:
        if self.end_of_turn_id is None:
            return "not known, the rows came finished"
        token = f"{self.end_of_turn!r} (token {self.end_of_turn_id})"
        return f"{token} is learned in {self.ended:,} of {self.kept:,} rows"


def _pairs(names: Mapping[str, str]) -> str:
    return ", ".join(f"{name} -> {to}" for name, to in names.items())
