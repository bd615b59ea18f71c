"""Rows of token ids as batches: padded on the right, or one after the other in a single row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adapters.data.tokens import IGNORED
from adapters.train.packing import restarting

Row: TypeAlias = Mapping[str, Any]  # `input_ids` and `labels`; `seq_lengths` too where it holds several documents


@dataclass(frozen=True)
class PaddedRows:
    """Each document in a row of its own, padded on the right.

    Args:
        pad: token id to pad with; it is masked, so it may be a token that means something.
        multiple: the width of a batch is a multiple of this many tokens.
    """

    pad: int
    multiple: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        documents = list(_documents(rows))
        longest = max(len(ids) for ids, _ in documents)
        longest += -longest % (self.multiple or 1)
        shape = (len(documents), longest)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, (tokens, learned) in enumerate(documents):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, : len(tokens)] = torch.tensor(learned)
            mask[i, : len(tokens)] = 1
        labels[:, 0] = IGNORED  # nothing predicts a first token
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class OneRow:
    """All documents in one row without padding and without a mask; `position_ids` restart with each."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        documents = list(_documents(rows))
        positions = restarting([len(ids) for ids, _ in documents])
        labels = torch.tensor([label for _, learned in documents for label in learned])[None]
        labels[positions == 0] = IGNORED  # the token before is another document's last
        ids = torch.tensor([token for tokens, _ in documents for token in tokens])[None]
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


@dataclass(frozen=True)
class CheaperRows:
    """One row where it saves work, else a padded batch; the loss is the same.

    Where attention computes scores between all tokens of a row, documents that share one pay for the pairs that the
    mask throws away. A transformer layer multiplies and adds about 12 width^2 times a token in its weights and
    2 width times a pair in its attention (Kaplan et al., 2020, arXiv 2001.08361, table 1).

    Args:
        padded: makes the padded batches.
        width: of the hidden states.
    """

    padded: PaddedRows
    width: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        lengths = [len(ids) for ids, _ in _documents(rows)]
        one, each = sum(lengths), max(lengths)
        work_in_one, work_padded = one * (6 * self.width + one), len(lengths) * each * (6 * self.width + each)
        return OneRow()(rows) if work_in_one < work_padded else self.padded(rows)


def _documents(rows: Sequence[Row]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The token ids and labels of each document; a row that TRL packed holds several."""
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        for start, end in pairwise([0, *accumulate(row.get("seq_lengths") or [len(ids)])]):
            yield ids[start:end], labels[start:end]
