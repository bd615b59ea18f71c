"""Held-out rows of token ids and labels: their losses, and what a model would have to answer in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from adapters.data.tokens import IGNORED
from adapters.train.batches import PaddedRows
from adapters.train.lesson import Advance
from adapters.train.loss import score, takes_columns, takes_pieces

_ALONE = PaddedRows(0)  # a row by itself has no padding
_BEGINNING = 32  # tokens of a plain text that are given, the rest being what a model should write


@dataclass(frozen=True)
class Loss:
    """Of one row: the cross-entropy summed over its learned tokens, in nats, and how many those are."""

    total: float
    tokens: int


@torch.no_grad()
def losses(model: Any, rows: Sequence[Mapping[str, Any]], advance: Advance = lambda rows: None) -> list[Loss]:
    """The loss of each row, every row in a forward of its own, so that no layout can matter."""
    columns_only, in_pieces = takes_columns(model), takes_pieces(model)
    found = []
    for row in rows:
        batch = {key: value.to(model.device) for key, value in _ALONE([row]).items()}
        scored = score(model, batch, columns_only, in_pieces=in_pieces)
        found.append(Loss(float(scored.total), int(scored.count)))
        advance(1)
    return found


@torch.no_grad()
def learned_logits(model: Any, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The outputs that predict the learned tokens, one row after the other."""
    found = []
    for row in rows:
        batch = {key: value.to(model.device) for key, value in _ALONE([row]).items()}
        chosen = (batch["labels"][0, 1:] != IGNORED).nonzero().squeeze(1)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        found.append(model(**inputs, use_cache=False).logits[0, chosen].float().cpu())
    return torch.cat(found)


def last_answer(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens before the last answer, and the answer's; of a text that is learned whole, its beginning and rest."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    end = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    if start == 0:
        start = max(1, min(_BEGINNING, end // 2))
    return ids[:start], ids[start:end]


def shared(training: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]) -> int:
    """How many held-out rows occur in training, token by token."""
    known = {tuple(ids) for row in training for ids in _documents(row)}
    return sum(tuple(row["input_ids"]) in known for row in held_out)


def _documents(row: Mapping[str, Any]) -> Iterator[list[int]]:
    """The documents of a row that TRL packed, or the row itself."""
    ids = row["input_ids"]
    for start, end in pairwise([0, *accumulate(row.get("seq_lengths") or [len(ids)])]):
        yield ids[start:end]
