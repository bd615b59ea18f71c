"""The loss over the answer tokens alone, with the output layer run only where an answer is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.data.tokens import IGNORED


def answer_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross-entropy summed over the labelled tokens of a right-padded batch, in nats.

    Equal to the loss over all positions, but the vocabulary-sized logits exist only for the positions that predict a
    label in some row: on a CPU the output layer over every position costs more than all the layers below it.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask`, `labels`, each `(rows, tokens)`; labels are -100 where nothing is learned.
    """
    targets = batch["labels"][:, 1:]  # position t predicts token t + 1
    columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad: int) -> dict[str, Tensor]:
    """Rows of `input_ids` and `labels` as one batch, padded on the right.

    Args:
        rows: each with `input_ids` and `labels` of one length.
        pad: token id to pad with; it is masked, so it may be a token that means something.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), longest), pad),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, :length] = 1
        batch["labels"][i, :length] = torch.tensor(row["labels"])
    return batch
