"""The first batches as rows of token ids and labels: packed documents apart, and shifted where a model shifts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from adapters._heads import output_embeddings
from adapters.data.tokens import IGNORED


@dataclass(frozen=True)
class Head:
    """What a model predicts: `classes` numbers below which labels lie, and whether position t predicts token t + 1."""

    classes: int | None
    language: bool  # whether the classes are the tokens of the vocabulary
    shifted: bool
    generates: bool


def head_of(model: nn.Module) -> Head:
    out, config = output_embeddings(model), getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    generates = bool(can()) if callable(can) else out is not None
    if out is None:
        several = getattr(config, "problem_type", None) not in ("regression", "multi_label_classification")
        labels = getattr(config, "num_labels", None)
        return Head(labels if several and labels != 1 else None, False, False, False)
    # a layer's own count: a 4-bit weight has another shape
    classes = getattr(out, "out_features", None) or next(out.parameters()).shape[0]
    shifted = generates and not getattr(config, "is_encoder_decoder", False)
    return Head(int(classes), True, shifted, generates)


def embedding_rows(model: nn.Module) -> int | None:
    """How many token ids the input embeddings know."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        table = getter() if callable(getter) else None
    except NotImplementedError:
        table = None
    rows = getattr(table, "num_embeddings", None)
    return int(rows) if rows is not None else None


def documents(batch: Mapping[str, Any], key: str) -> Iterator[Tensor]:
    """Each document's values of `key`, `(tokens,)`: a row, or, where position ids start anew, each part of it."""
    positions = batch.get("position_ids")
    for i, row in enumerate(batch[key]):
        if not isinstance(positions, Tensor) or positions.shape != batch[key].shape:
            yield row
            continue
        starts = [0, *(positions[i][1:] == 0).nonzero().flatten().add(1).tolist(), len(row)]
        # padding has position 0 as well, and makes documents of one token, which teach nothing
        yield from (row[start:end] for start, end in pairwise(starts) if end - start > 1)


def learned(batch: Mapping[str, Any], head: Head) -> list[Tensor]:
    """The labels that count, document by document; empty where there is none."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return []
    if labels.dim() < 2 or labels.is_floating_point():
        return [row.reshape(-1)[row.reshape(-1) != IGNORED] for row in labels]
    kept = (row[1:] if head.shifted else row for row in documents(batch, "labels"))
    return [row[row != IGNORED] for row in kept]


def placed(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch where the model is."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
