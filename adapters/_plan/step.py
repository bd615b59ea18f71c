"""One training step as our trainer does it, with the bytes that are alive at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters._attach.signature import forward_parameters
from adapters._attach.swap import base_class
from adapters._errors import AdapterError
from adapters._evaluating import evaluating
from adapters._plan.assumed import Assumed, as_if_real
from adapters._plan.hollow import Hollow
from adapters._plan.ledger import OTHER, Ledger
from adapters.train.loss import score, takes_columns, takes_pieces

LABELLED = "of the labelled tokens, whose logits alone are made"
OWN = "the model's own"
NONE = "of the last hidden states, for want of a head"


@dataclass(frozen=True)
class Batch:
    """A micro-batch and how it is gone through.

    Args:
        rows, tokens: of the micro-batch; every row has all its tokens.
        learned: tokens of a row that the loss looks at.
        accumulation: micro-batches of a step.
        checkpointing: activations are computed twice, and few are kept.
        padded: with a mask, as where rows differ in length.
    """

    rows: int
    tokens: int
    learned: int
    accumulation: int = 1
    checkpointing: bool = False
    padded: bool = False


@dataclass(frozen=True)
class Peak:
    """Bytes alive when they were most, by what they are for."""

    base: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    at: str = ""  # the op that made it

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.moments + self.activations


def measure(hollow: Hollow, batch: Batch) -> Peak:
    """The peak of one step of a model of fake tensors.

    Raises:
        AdapterError: the model cannot be run in this way.
    """
    model, ledger = hollow.model, hollow.ledger
    gc.collect()  # of an earlier batch
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        with _claiming(trained, ledger), _training(model, batch):
            run = _forward(model, hollow.assumed, batch)
            for _ in range(min(batch.accumulation, 2)):  # from the second on, all are alike
                ledger.start()
                run().backward()  # type: ignore[no-untyped-call]
            hollow.optimizer.step()
    except AdapterError:
        raise
    except Exception as error:  # whatever a stranger's forward may raise
        raise AdapterError(f"a step of {type(model).__name__} cannot be planned: {_short(error)}") from error
    finally:
        hollow.optimizer.zero_grad()
    base, adapter, gradients, moments, rest = (
        ledger.peak.get(group, 0) for group in ("base", "adapter", "gradients", "moments", OTHER)
    )
    return Peak(base, adapter, gradients, moments, rest, ledger.at)


@contextmanager
def _claiming(trained: list[nn.Parameter], ledger: Ledger) -> Iterator[None]:
    """Counts what arrives in `.grad` as gradients."""

    def claim(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.claim([parameter.grad], "gradients")

    handles = [p.register_post_accumulate_grad_hook(claim) for p in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _training(model: Any, batch: Batch) -> Iterator[None]:
    if batch.checkpointing:
        try:
            model.gradient_checkpointing_enable()
        except (AttributeError, ValueError) as error:
            raise AdapterError(f"a {type(model).__name__} has no gradient checkpointing.") from error
    model.train()
    try:
        with nullcontext() if batch.padded else as_if_real():
            yield
    finally:
        model.eval()
        if batch.checkpointing:
            model.gradient_checkpointing_disable()


def _forward(model: Any, assumed: Assumed, batch: Batch) -> Callable[[], Tensor]:
    """What runs a micro-batch up to its loss."""
    if "input_ids" not in forward_parameters(base_class(model)):
        raise AdapterError(f"rows of tokens are planned, and a {type(model).__name__} takes no input_ids.")
    ids = torch.zeros((batch.rows, batch.tokens), dtype=torch.long)
    inputs = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if batch.padded else {})}
    how = loss_kind(model)
    if how == LABELLED:
        labels, columns, pieces = torch.zeros_like(ids), takes_columns(model), takes_pieces(model)

        def labelled() -> Tensor:
            assumed.found = batch.rows * batch.learned if pieces else batch.learned
            scored = score(model, {**inputs, "labels": labels}, columns, in_pieces=pieces)
            return scored.total / (batch.rows * batch.learned)

        return labelled
    if how == OWN:
        own = _own_labels(model, ids)
        return lambda: cast(Tensor, model(**inputs, labels=own).loss)
    return lambda: cast(Tensor, model(**inputs)[0].float().square().mean())


def _own_labels(model: Any, ids: Tensor) -> Tensor:
    """Labels of the shape that the model's own loss takes: one for each row, or for each token."""
    if model.config.is_encoder_decoder:
        return torch.zeros_like(ids)
    with evaluating(model):
        logits = model(input_ids=ids[:1, :8]).logits
    return torch.zeros_like(ids) if logits.dim() == 3 else torch.zeros(len(ids), dtype=torch.long)


def loss_kind(model: Any) -> str:
    """Which loss a step of `model` has."""
    generates = getattr(model, "can_generate", lambda: False)()
    if generates and not getattr(model.config, "is_encoder_decoder", False):
        return LABELLED
    return OWN if "labels" in forward_parameters(base_class(model)) else NONE


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
