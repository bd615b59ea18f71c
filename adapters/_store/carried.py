"""Tokens that saved adapters bring along: rows in the base's tables and entries of the tokenizer, where they lack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from adapters._attach import PLAIN_TOKENS, table_of
from adapters._errors import AdapterError
from adapters._resize import remembered
from adapters._store.bundle import Bundle
from adapters._tokens import add_tokens

Bring = Callable[[Iterable[Bundle]], tuple[str, ...]]


@contextmanager
def carrying(model: nn.Module, tokenizer: Any) -> Iterator[Bring]:
    """What gives the model the rows of adapters' tokens, and says so; undone where what follows fails.

    The tokenizer takes the tokens at the end, when nothing can fail any more.

    Args:
        tokenizer: None leaves both as they are.
    """
    undo: list[Callable[[], None]] = []
    brought: dict[str, bool] = {}  # by text, whether it is special

    def bring(bundles: Iterable[Bundle]) -> tuple[str, ...]:
        held = [bundle for bundle in bundles if bundle.tokens is not None]
        if tokenizer is None or not held:
            return ()
        scratch = copy.deepcopy(tokenizer)
        _add(scratch, brought)
        wanted, known = _by_number(held), scratch.get_vocab()
        plain = {str(text) for bundle in held for text in _listed(bundle.facts.get(PLAIN_TOKENS))}
        fresh = {text: text not in plain for text in wanted.values() if text not in known}
        _add(scratch, fresh)
        _require_numbers(scratch, wanted)
        tables = dict.fromkeys(path for bundle in held if bundle.tokens is not None for path in bundle.tokens.tables)
        short = [path for path in tables if _rows(model, path) <= max(wanted)]
        if short:
            undo.append(remembered(model))
            add_tokens(model, scratch, wanted.values())
        brought.update(fresh)
        return (*_said(fresh), *(f"{path} has {_rows(model, path):,} rows now." for path in short))

    try:
        yield bring
    except BaseException:
        for each in reversed(undo):
            each()
        raise
    _add(tokenizer, brought)


def _add(tokenizer: Any, texts: dict[str, bool]) -> None:
    for text, special in texts.items():
        tokenizer.add_tokens([text], special_tokens=special)


def _said(fresh: dict[str, bool]) -> Iterator[str]:
    for special, how in ((True, ", as special tokens"), (False, "")):
        texts = [text for text, is_special in fresh.items() if is_special == special]
        if texts:
            yield f"the tokenizer took {', '.join(map(repr, texts))}{how}."


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else ()


def _by_number(bundles: Iterable[Bundle]) -> dict[int, str]:
    """The texts of all tokens by ascending number."""
    found: dict[int, str] = {}
    for bundle in bundles:
        tokens = bundle.tokens
        if tokens is None:
            continue
        if not all(tokens.texts):
            raise AdapterError(
                f"the adapter does not say what its tokens {tokens.named()} are: add them with adapters.add_tokens, "
                "and load without tokenizer=."
            )
        for number, text in zip(tokens.ids, tokens.texts, strict=True):
            if found.setdefault(number, text) != text:
                raise AdapterError(f"token {number} is {found[number]!r} in one part and {text!r} in another.")
    return dict(sorted(found.items()))


def _rows(model: nn.Module, path: str) -> int:
    table = table_of(model, path)
    if table is None:
        raise AdapterError(f"this model has no {path}, where the adapter trains rows of tokens.")
    return int(table.shape[0])


def _require_numbers(grown: Any, wanted: dict[int, str]) -> None:
    """Refuses a tokenizer in which the adapters' tokens have, or would get, other numbers."""
    numbers = grown.get_vocab()
    for number, text in wanted.items():
        if numbers.get(text) != number:
            raise AdapterError(
                f"the tokenizer gives {text!r} the number {numbers.get(text)}, and the adapter was trained with "
                f"{number}: take the base's own tokenizer, and first add the tokens that were added before."
            )
