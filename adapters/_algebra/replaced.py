"""Heads and rows of tokens in a combination: they replace what the base has, and so can be averaged, not added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from adapters._algebra.operands import Operand
from adapters._algebra.thin import wide
from adapters._attach import Tokens
from adapters._errors import AdapterError

Terms: TypeAlias = Sequence[tuple[float, Operand]]


@dataclass(frozen=True)
class Replaced:
    """What the new adapter has in place of tensors of the base."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    labels: dict[str, str] | None = None
    tokens: Tokens | None = None
    notes: tuple[str, ...] = ()


def replaced(terms: Terms) -> Replaced:
    """The only adapter's that has any, as they are, or the average of all.

    Raises:
        AdapterError: several have, and not of one kind, or their weights do not sum to 1.
    """
    having = [(weight, operand) for weight, operand in terms if operand.replaced]
    if not having:
        return Replaced()
    first = having[0][1]
    if len(having) == 1:
        found = {key: wide(tensor) for key, tensor in first.replaced.items()}
        notes = (f"heads and rows of tokens are those of {first.label!r}, whatever its weight",)
        return _like(first, found, notes)
    _require_alike([operand for _, operand in having])
    total = sum(weight for weight, _ in having)
    if abs(total - 1) > 1e-6:
        labels = ", ".join(repr(operand.label) for _, operand in having)
        raise AdapterError(
            f"{labels} replace weights of the base (heads, rows of tokens), and what replaces can only be averaged: "
            f"give them weights that sum to 1 instead of {total:g}."
        )
    found = {key: 0.0 * wide(tensor) for key, tensor in first.replaced.items()}
    for weight, operand in having:
        found = {key: tensor + weight * wide(operand.replaced[key]) for key, tensor in found.items()}
    return _like(first, found, ("heads and rows of tokens are averaged",))


def _like(operand: Operand, tensors: dict[str, Tensor], notes: tuple[str, ...]) -> Replaced:
    bundle = operand.bundle
    labels = dict(bundle.labels) if bundle.labels is not None else None
    return Replaced(tensors, bundle.head, labels, bundle.tokens, notes)


def _require_alike(operands: Sequence[Operand]) -> None:
    first = operands[0]
    for other in operands[1:]:
        shapes = [{key: tensor.shape for key, tensor in each.replaced.items()} for each in (first, other)]
        same = first.bundle.head == other.bundle.head and first.bundle.labels == other.bundle.labels
        tokens = [each.bundle.tokens for each in (first, other)]
        rows = [(held.ids, held.tables) if held is not None else None for held in tokens]
        if not same or shapes[0] != shapes[1] or rows[0] != rows[1]:
            raise AdapterError(
                f"the heads, labels or tokens of {first.label!r} and {other.label!r} differ, so no average of them "
                "means anything."
            )
