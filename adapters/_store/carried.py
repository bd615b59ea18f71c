"""Tokens that saved adapters bring along: rows in the base's tables and entries of the tokenizer, where they lack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from adapters._attach import Tokens, table_of
from adapters._errors import AdapterError
from adapters._resize import remembered
from adapters._tokens import add_tokens

Bring = Callable[[Tokens | None], tuple[str, ...]]


@contextmanager
def carrying(model: nn.Module, tokenizer: Any) -> Iterator[Bring]:
    """What gives the model the rows of an adapter's tokens, and says so; undone where what follows fails.

    The tokenizer takes the tokens at the end, when nothing can fail any more.

    Args:
        tokenizer: None leaves both as they are.
    """
    undo: list[Callable[[], None]] = []
    brought: list[str] = []
    scratch = copy.deepcopy(tokenizer)

    def bring(tokens: Tokens | None) -> tuple[str, ...]:
        if tokens is None or scratch is None:
            return ()
        known = scratch.get_vocab()
        fresh = [text for text in tokens.texts if text not in known]
        _require_numbers(scratch, tokens, fresh)
        short = [path for path in tokens.tables if _rows(model, path) <= tokens.ids[-1]]
        if short:
            undo.append(remembered(model))
            add_tokens(model, scratch, tokens.texts)
        elif fresh:
            scratch.add_tokens(fresh, special_tokens=True)
        brought.extend(fresh)
        notes = [f"the tokenizer took {', '.join(map(repr, fresh))}, as special tokens."] if fresh else []
        notes += [f"{path} has {_rows(model, path):,} rows now." for path in short]
        return tuple(notes)

    try:
        yield bring
    except BaseException:
        for each in reversed(undo):
            each()
        raise
    if brought:
        tokenizer.add_tokens(brought, special_tokens=True)


def _rows(model: nn.Module, path: str) -> int:
    table = table_of(model, path)
    if table is None:
        raise AdapterError(f"this model has no {path}, where the adapter trains rows of tokens.")
    return int(table.shape[0])


def _require_numbers(tokenizer: Any, tokens: Tokens, fresh: list[str]) -> None:
    """Refuses a tokenizer in which the adapter's tokens have, or would get, other numbers."""
    if not all(tokens.texts):
        raise AdapterError(
            f"the adapter does not say what its tokens {tokens.named()} are: add them with adapters.add_tokens, and "
            "load without tokenizer=."
        )
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(fresh, special_tokens=True)
    numbers = grown.get_vocab()
    for number, text in zip(tokens.ids, tokens.texts, strict=True):
        if numbers.get(text) != number:
            raise AdapterError(
                f"the tokenizer gives {text!r} the number {numbers.get(text)}, and the adapter was trained with "
                f"{number}: take the base's own tokenizer, and first add the tokens that were added before."
            )
