"""Rows of memory follow their model to other devices and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adapters._attach.bank import Row
from adapters._attach.state import STATE, State


def moving(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The root's `_apply`, with the rows. What holds them is no child of the root, which may run all of its children,
    one after another, as a SentenceTransformer does."""

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        made = inner(self, fn, *args, **kwargs)
        state: State | None = self.__dict__.get(STATE)
        if state is not None and (rows := state.rows()):
            _move(state, rows, fn)
        return made

    return _apply


def _move(state: State, rows: list[Row], change: Callable[[Tensor], Tensor]) -> None:
    for layout in {id(row.layout): row.layout for row in rows}.values():
        layout.apply(change)
        if layout.table is not None:
            layout.table.apply(change)
    for row in rows:
        row.apply(change)
    state.layouts.clear()  # the next adapter of a kind may be on another device, or of another dtype
