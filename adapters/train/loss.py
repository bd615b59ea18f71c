"""The loss over the labelled tokens alone, with the output layer run only where a label is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters._attach.state import unwrapped
from adapters._evaluating import evaluating
from adapters.data.tokens import IGNORED
from adapters.train.documents import lengths_of
from adapters.train.head import can_stop_early, head_sums, up_to_head
from adapters.train.packing import block_mask


@dataclass(frozen=True, eq=False)
class Scored:
    """One forward over a batch; sums run over its labelled tokens."""

    total: Tensor  # cross-entropy, nats
    count: Tensor  # labelled tokens
    correct: Tensor  # labelled tokens that are the most likely ones
    entropy: Tensor  # of the predictions, nats
    outputs: Any  # the model's own


def score(
    model: Any,
    batch: Mapping[str, Any],
    columns_only: bool,
    mask: torch.dtype | None = None,
    by_document: bool = False,
    in_pieces: bool = False,
    **inputs: Any,
) -> Scored:
    """Runs a batch and compares the predictions with its labels.

    With `columns_only` the vocabulary-sized logits exist only for the positions that predict a label in some row: on a
    CPU the output layer over every position costs more than all the layers below it.

    Args:
        model: a causal language model, wrapped or not.
        batch: `input_ids` and `labels`, `(rows, tokens)`, with an `attention_mask` where rows are padded on the right,
            or `position_ids` where documents share a row; labels are -100 where nothing is learned.
        columns_only: the model takes the positions whose logits are wanted; otherwise all are computed.
        mask: the dtype of the block-diagonal mask that keeps documents in a row apart; None: `position_ids` do.
        by_document: attention is told the lengths of the documents in a row.
        in_pieces: the head runs on labelled tokens alone, some at a time, where the model is not in shards.
        inputs: further arguments of the forward.
    """
    targets = batch["labels"][:, 1:]  # position t predicts token t + 1
    inputs = {**{key: value for key, value in batch.items() if key != "labels"}, "use_cache": False, **inputs}
    if mask is not None and "position_ids" in batch and "attention_mask" not in batch:
        inputs["attention_mask"] = block_mask(batch["position_ids"], mask)
    if by_document and "position_ids" in batch:
        inputs |= lengths_of(batch["position_ids"])
    if in_pieces and can_stop_early(model):
        return _scored_in_pieces(model, inputs, targets)
    columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
    if columns_only:
        inputs["logits_to_keep"] = columns
    outputs = model(**inputs)
    logits = outputs.logits if columns_only else outputs.logits[:, columns.to(outputs.logits.device)]
    wanted = targets[:, columns].to(logits.device)
    learned = wanted != IGNORED
    chances = F.log_softmax(logits.float(), -1)
    total = F.nll_loss(chances.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        correct = ((chances.argmax(-1) == wanted) & learned).sum()
        entropy = (torch.special.entr(chances.exp()).sum(-1) * learned).sum()
    return Scored(total, learned.sum(), correct, entropy, outputs)


def _scored_in_pieces(model: Any, inputs: Mapping[str, Any], targets: Tensor) -> Scored:
    outputs, below = up_to_head(model, inputs)
    states = below.last_hidden_state
    learned = (targets != IGNORED).to(states.device).nonzero(as_tuple=True)
    labels = targets.to(states.device)[learned]
    if not len(labels):  # a sum over nothing, of which backward can still be taken
        nothing = states.new_zeros((), dtype=torch.float32)
        return Scored(states[:, :0].float().sum(), labels.sum(), nothing.long(), nothing, outputs)
    found = head_sums(model, inputs, below, states[learned], labels)
    return Scored(found.total, torch.tensor(len(labels), device=states.device), found.correct, found.entropy, outputs)


def takes_pieces(model: Any) -> bool:
    """Whether the head may run on some hidden states at a time: tried, and held against the logits of every token."""
    if not (_takes_columns(model) and can_stop_early(model)):
        return False
    device = unwrapped(model).get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.tensor([[5, 2, 7, 3, 6, 4, 1]], device=device)
    batch = {"input_ids": ids, "labels": torch.where(ids % 2 == 1, ids, IGNORED)}
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        whole = score(model, batch, False)
        try:
            pieces = score(model, batch, True, in_pieces=True)
        except Exception:  # whatever a model does when its layers answer without being run
            return False
    precision = torch.finfo(whole.outputs.logits.dtype).eps ** 0.5
    pairs = ((whole.total, pieces.total), (whole.entropy, pieces.entropy))
    return all(torch.allclose(a.float(), b.float(), rtol=precision, atol=precision) for a, b in pairs)


def takes_columns(model: Any) -> bool:
    """Whether `logits_to_keep` may be a tensor of positions: tried, since some models take a count only."""
    if not _takes_columns(model):
        return False
    device = unwrapped(model).get_input_embeddings().weight.device  # type: ignore[operator]
    ids, columns = torch.tensor([[5, 2, 7, 3, 6, 4, 1]], device=device), torch.tensor([1, 4], device=device)
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        whole = model(input_ids=ids, use_cache=False).logits[:, columns]
        try:
            kept = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        except Exception:  # whatever a model does with an argument that it was not made for
            return False
    tolerance = torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
    return kept.shape == whole.shape and torch.allclose(kept, whole, rtol=0, atol=tolerance)


def _takes_columns(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
