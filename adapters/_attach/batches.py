"""Fits a selection to the batch of a forward, and runs a batch in parts where its rows cannot be told apart inside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from adapters._attach.acting import UNKNOWN_ROWS, Here, Node, Shape, Spans
from adapters._attach.merging import joined, joined_sequences
from adapters._attach.per_row import PerRow, adapters_in
from adapters._attach.signature import of_rows, shape_of
from adapters._attach.state import SHAPE, Acting, Notes, State, holding
from adapters._errors import AdapterError

GENERATE = ("inputs",)  # what `generate` takes by position
GENERATING = "generating"  # in the notes of a `generate`: each row may have become several, one after the other
Run: TypeAlias = Callable[..., Any]


class Repeated:
    """The whole batch once for each part."""

    def __init__(self, parts: tuple[Node, ...]) -> None:
        self.parts = parts
        self.per_row: dict[int, PerRow] = {}

    def act(self, here: Here, y: Tensor) -> Tensor:
        raise AdapterError(UNKNOWN_ROWS)

    def rows(self, count: int) -> PerRow:
        if count not in self.per_row:
            self.per_row[count] = PerRow(tuple(part for part in self.parts for _ in range(count)))
        return self.per_row[count]


def bound(
    state: State, acting: Acting, kept: Notes, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Acting:
    """The selection for this batch, whose shape goes into the notes `kept` of the forward.

    Raises:
        AdapterError: a selection by row has another length than the batch.
    """
    node = acting.node
    kept[SHAPE] = shape = shape_of(names, args, kwargs)
    if not isinstance(node, PerRow):
        return acting
    wanted, rows = len(node.parts), shape.rows if shape is not None else 0
    if rows != wanted:
        if not kept.get(GENERATING) or not rows or rows % wanted:
            raise AdapterError(_unlike(rows, wanted))
        node = node.repeated(rows // wanted)
        acting = Acting.of(acting, acting.value, node)
    before = state.stacked() if state.stacked is not None else None
    if before is not node:  # what was stacked for another selection is as large as its adapters
        if before is not None:
            before.forget()
        state.stacked = weakref.ref(node)
    node.refresh()
    return acting


def of_generate(acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Notes:
    """The notes of a `generate` that starts; inside, each row may become several.

    Raises:
        AdapterError: a selection by row has another length than the batch of prompts.
    """
    if not isinstance(acting.node, PerRow):
        return {GENERATING: True}
    shape, wanted = shape_of(GENERATE, args, kwargs), len(acting.node.parts)
    if shape is not None and shape.rows != wanted:
        raise AdapterError(_unlike(shape.rows, wanted))
    return {GENERATING: True, SHAPE: Shape(wanted)}


def _unlike(rows: int, entries: int) -> str:
    return f"the batch has {rows} rows and the selection {entries} entries: give one entry per row."


def padding(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """The token with which a `generate` fills up sequences that ended early."""
    given = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    sources: list[Mapping[str, Any]] = [kwargs, *(vars(config) for config in given if config is not None)]
    for key in ("pad_token_id", "eos_token_id"):
        for source in sources:
            found = source.get(key)
            found = found[0] if isinstance(found, list | tuple) and found else found
            if isinstance(found, int):
                return found
    return 0


def by_selection(
    state: State, acting: Acting, names: tuple[str, ...], pad: Callable[[], int] | None = None
) -> Run | None:
    """How to run a batch that one call of the model cannot, or None: `run(call, args, kwargs)`.

    Args:
        pad: for a `generate`: gives the token that fills up shorter sequences.
    """
    node = acting.node
    if isinstance(node, Repeated):
        return lambda call, args, kwargs: _repeated(state, acting, node, names, call, args, kwargs)
    if isinstance(node, PerRow) and acting.separately:
        put_together = joined if pad is None else partial(joined_sequences, pad=pad())
        return lambda call, args, kwargs: _separately(state, acting, node, names, put_together, call, args, kwargs)
    return None


def _repeated(
    state: State, acting: Acting, node: Repeated, names: tuple[str, ...], call: Run, args: Any, kwargs: Any
) -> Any:
    shape = _shape(names, args, kwargs)
    args, kwargs = of_rows(shape.rows, names, args, kwargs, lambda x: torch.cat([x] * len(node.parts)))
    whole = Acting.of(acting, acting.value, node.rows(shape.rows), acting.separately)
    with holding(state, whole):
        return call(*args, **kwargs)


def _separately(
    state: State,
    acting: Acting,
    node: PerRow,
    names: tuple[str, ...],
    put_together: Run,
    call: Run,
    args: Any,
    kwargs: Any,
) -> Any:
    """One call for each distinct selection, on its rows."""
    shape = _shape(names, args, kwargs)
    if shape.rows != len(node.parts):
        raise AdapterError(_unlike(shape.rows, len(node.parts)))
    if dict(zip(names, args, strict=False)).get("past_key_values", kwargs.get("past_key_values")) is not None:
        raise AdapterError(f"this batch runs once per selection ({acting.separately}), and a cache cannot be divided.")
    if "use_cache" in names and put_together is joined:
        kwargs = {**kwargs, "use_cache": False}
    rows_of: dict[Node, list[int]] = {}
    for row, part in enumerate(node.parts):
        rows_of.setdefault(part, []).append(row)
    results = []
    for part, rows in rows_of.items():
        index = torch.tensor(rows)
        some, more = of_rows(shape.rows, names, args, kwargs, lambda x, index=index: x[index.to(x.device)])  # type: ignore[misc]
        with holding(state, acting_of(part, acting)):
            results.append(call(*some, **more))
    return put_together(results, list(rows_of.values()))


def acting_of(node: Node, whole: Acting) -> Acting:
    """What acts where only `node`, a part of `whole`, does."""
    adapters = adapters_in(node)
    return Acting.of(adapters, whole.value, None if node is None or node in adapters else node)


def _shape(names: tuple[str, ...], args: Any, kwargs: Any) -> Shape:
    found = shape_of(names, args, kwargs)
    if found is None:
        raise AdapterError("no tensor was given whose rows a selection could be divided over.")
    return found


def refuse_in_compiled_code(acting: Acting) -> None:
    """What compiled code cannot do with a selection."""
    if isinstance(acting.node, Spans):
        raise AdapterError(
            f"compiled code cannot run {acting.value!r}, which counts tokens: call the model uncompiled."
        )
    if acting.separately or isinstance(acting.node, Repeated):
        why = acting.separately or "Parallel repeats the batch"
        raise AdapterError(f"compiled code cannot run {acting.value!r}: {why}. Call the model uncompiled for it.")
