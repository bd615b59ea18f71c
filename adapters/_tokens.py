"""`adapters.add_tokens`: new tokens for a tokenizer, and rows for them in a model, the same each time.

A new row starts as the mean of the rows of the pieces that its token was split into before.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from adapters._attach import table_of, table_paths
from adapters._attach.state import STATE
from adapters._errors import AdapterError
from adapters._resize import resize
from adapters._sharded import is_sharded


@dataclass(frozen=True)
class TokensReport:
    """What `add_tokens` did. `ids` are those of all tokens that were asked for; `resized` maps tables to their rows."""

    ids: Mapping[str, int]
    known: tuple[str, ...]  # those that the tokenizer had before
    resized: Mapping[str, tuple[int, int]]  # path of a parameter -> rows before and after
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        fresh = [token for token in self.ids if token not in self.known]
        lines = [f"added {len(fresh)} tokens"]
        lines += [f"  {number:>8}  {token}{_known(token, self.known)}" for token, number in self.ids.items()]
        lines += [f"  {path}: {old:,} rows, now {new:,}" for path, (old, new) in self.resized.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _known(token: str, known: Sequence[str]) -> str:
    return " (was there)" if token in known else ""


def add_tokens(model: nn.Module, tokenizer: Any, tokens: str | Iterable[str], *, special: bool = True) -> TokensReport:
    """Adds tokens to `tokenizer` and, where `model` has no rows for them, rows to its embeddings: all or nothing.

    On an equal base the same call gives equal weights, bit for bit. `adapters.attach(..., tokens=...)` then trains the
    rows with an adapter. Rows that a table has beyond the tokenizer's vocabulary are used as they are.

    Args:
        model: a model of transformers without adapters, whose tables of tokens are not in 4 bits.
        tokens: texts; those that the tokenizer has already keep their numbers.
        special: whether the tokenizer never splits or normalises them, and leaves them out of text when asked to.

    Raises:
        AdapterError: with model and tokenizer unchanged.

    Example:
        >>> import adapters
        >>> model, tokenizer = adapters.load_base("smollm2-135m-instruct")  # doctest: +SKIP
        >>> adapters.add_tokens(model, tokenizer, ["<|tool|>", "<|result|>"]).ids  # doctest: +SKIP
        {'<|tool|>': 49152, '<|result|>': 49153}
    """
    wanted = [tokens] if isinstance(tokens, str) else list(tokens)
    if not wanted or not all(isinstance(token, str) and token for token in wanted):
        raise AdapterError(f"tokens is {wanted!r}: give texts, such as ['<|tool|>'].")
    _require_bare(model)
    paths, before = table_paths(model), tokenizer.get_vocab()
    if any(_table(model, path).is_meta for path in paths):
        raise AdapterError("the embeddings are offloaded or have no values yet: load the base without offloading.")
    known = tuple(dict.fromkeys(token for token in wanted if token in before))
    new = [token for token in dict.fromkeys(wanted) if token not in before]
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(new, special_tokens=special)
    vocabulary = grown.get_vocab()
    lost = [token for token in new if token not in vocabulary]
    if lost:
        raise AdapterError(f"the tokenizer ({type(tokenizer).__name__}) does not take the token {lost[0]!r}.")
    ids = {token: vocabulary[token] for token in dict.fromkeys(wanted)}
    rows = {path: _table(model, path).shape[0] for path in paths}
    fewest, size = min(rows.values()), max(ids.values()) + 1
    if size > fewest:
        size = max(size, *rows.values())  # transformers gives all tables one size
        resize(model, paths, size, _pieces(grown, vocabulary, fewest, size))
    tokenizer.add_tokens(new, special_tokens=special)  # which the copy has just done
    resized = {path: (old, _table(model, path).shape[0]) for path, old in rows.items()}
    resized = {path: (old, new) for path, (old, new) in resized.items() if old != new}
    return TokensReport(ids, known, resized, _notes(ids, known, fewest, size))


def _require_bare(model: nn.Module) -> None:
    if any(STATE in module.__dict__ for module in model.modules()):
        raise AdapterError("adapters are attached, and new rows change their base: add tokens first, or detach them.")
    if not callable(getattr(model, "resize_token_embeddings", None)):
        raise AdapterError(f"a {type(model).__name__} has no embeddings that transformers can resize.")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise AdapterError("this model is sharded already: add tokens first, then shard it.")


def _table(model: nn.Module, path: str) -> nn.Parameter:
    return cast(nn.Parameter, table_of(model, path))


def _notes(ids: Mapping[str, int], known: Sequence[str], rows: int, size: int) -> tuple[str, ...]:
    there = [token for token, number in ids.items() if number < rows and token not in known]
    found = [f"{', '.join(there)} use rows that the tables had already, as they are"] if there else []
    skipped = max(0, size - rows) - sum(number >= rows for number in ids.values())
    found += [f"{skipped} further rows were made, of numbers below those of the new tokens"] if skipped > 0 else []
    return tuple(found)


def _pieces(grown: Any, vocabulary: Mapping[str, int], rows: int, size: int) -> list[list[int]]:
    """For each new row the rows of what its token was split into; none where that cannot be told.

    Asked of the tokenizer without all tokens that have no row, whether they were added just now or long before.
    """
    backend = getattr(grown, "backend_tokenizer", None)
    if backend is None:
        return [[] for _ in range(rows, size)]
    from tokenizers import Tokenizer

    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < rows]
    described["truncation"] = described["padding"] = None
    plain, texts = Tokenizer.from_str(json.dumps(described)), {number: text for text, number in vocabulary.items()}
    found = [plain.encode(texts.get(number, ""), add_special_tokens=False).ids for number in range(rows, size)]
    return [[piece for piece in pieces if piece < rows] for pieces in found]
