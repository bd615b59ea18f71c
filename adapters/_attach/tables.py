"""The tables of a model in which tokens have rows: which they are, who holds them, and what can be trained there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from adapters._attach.inputs import input_embeddings
from adapters._attach.tokens import PLAIN_TOKENS, Tokens
from adapters._coded import bits_of
from adapters._errors import AdapterError, nearest
from adapters._heads import output_embeddings

Wanted: TypeAlias = str | Iterable[str | int]


def chosen_tokens(model: nn.Module, wanted: Wanted | None, tokenizer: Any) -> Tokens | None:
    """The tokens that `attach` was asked for.

    Raises:
        AdapterError: one is unknown, named twice, or has no row; or the model's tables cannot be trained in part.
    """
    if wanted is None:
        return None
    given = [wanted] if isinstance(wanted, str) else list(wanted)
    known = dict(tokenizer.get_vocab()) if tokenizer is not None else {}
    texts = {number: text for text, number in known.items()}
    ids = [_id(token, known) for token in given]
    if not ids or len(set(ids)) < len(ids):
        twice = next((token for i, token in enumerate(given) if ids[i] in ids[:i]), None)
        raise AdapterError(f"tokens names {twice!r} twice." if ids else "tokens is empty: name some, or leave it out.")
    ids.sort()
    found = Tokens(tuple(ids), tuple(texts.get(number, "") for number in ids), table_paths(model))
    require_rows(model, found)
    return found


def plain_tokens(tokens: Tokens, tokenizer: Any) -> dict[str, object]:
    """The fact that names the tokens that were added without being special, where there are such."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    plain = [
        text
        for number, text in zip(tokens.ids, tokens.texts, strict=True)
        if number in added and not getattr(added[number], "special", True)
    ]
    return {PLAIN_TOKENS: plain} if plain else {}


def _id(token: str | int, known: Mapping[str, int]) -> int:
    if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
        return token
    if not isinstance(token, str):
        raise AdapterError(f"tokens holds {token!r}: a token is a text, with tokenizer=, or its number.")
    if not known:
        raise AdapterError(f"tokens holds the text {token!r}: pass tokenizer= as well, or the token's number.")
    if token not in known:
        raise AdapterError(
            f"the tokenizer has no token {token!r}{nearest(token, known)} "
            f"adapters.add_tokens(model, tokenizer, [{token!r}]) adds it."
        )
    return known[token]


def table_paths(model: nn.Module) -> tuple[str, ...]:
    """The tables of tokens: of the input embeddings, and of the output embeddings where that is another parameter.

    Raises:
        AdapterError: the model looks no tokens up, or its tables are in 4 bits.
    """
    entry = next(input_embeddings(model), None)
    if not isinstance(entry, nn.Embedding):
        what = "none" if entry is None else f"a {type(entry).__name__}"
        raise AdapterError(f"this model has no table of tokens: its input embeddings are {what}, not an Embedding.")
    tables = {id(entry._parameters["weight"]): entry._parameters["weight"]}
    head = output_embeddings(model)
    held = head._parameters.get("weight") if head is not None else None
    if held is not None:
        tables[id(held)] = held
    paths = {id(parameter): path for path, parameter in reversed(list(model.named_parameters()))}
    found = tuple(paths[each] for each in tables)
    for path, parameter in zip(found, tables.values(), strict=True):
        if bits := bits_of(parameter):
            raise AdapterError(
                f"{path} is in {bits} bits, and single rows of it cannot be trained: leave it in 16 bits."
            )
    return found


def table_of(model: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter at `path`, whatever acts on it; None where there is none."""
    owner, _, name = path.rpartition(".")
    module = model
    for part in owner.split(".") if owner else ():
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module._parameters.get(name)


def owners(model: nn.Module, table: str) -> list[tuple[str, str]]:
    """Every module that holds the table, by path, and its name there: of a tied one there are several."""
    parameter = table_of(model, table)
    return [
        (path, name)
        for path, module in model.named_modules()
        for name, held in module._parameters.items()
        if held is parameter and held is not None
    ]


def require_rows(model: nn.Module, tokens: Tokens) -> None:
    """Refuses a model whose tables have no rows for these tokens, or hold them out of reach.

    Raises:
        AdapterError: the sentence says how to add them.
    """
    for path in tokens.tables:
        table = table_of(model, path)
        if table is None:
            raise AdapterError(f"this model has no {path}, where the adapter trains the rows of {tokens.named()}.")
        bits = bits_of(table)
        if bits or table.is_meta:
            why = f"in {bits} bits" if bits else "offloaded"
            raise AdapterError(f"{path} is {why}, and rows of it cannot be trained there: load the base otherwise.")
        if table.dim() != 2 or table.shape[0] <= tokens.ids[-1]:
            raise AdapterError(
                f"{path} has {table.shape[0]:,} rows, and the adapter trains those of {tokens.named()}: "
                f"pass tokenizer= to adapters.load, or first call adapters.add_tokens(model, tokenizer, "
                f"{_listed(tokens, table.shape[0])})."
            )


def _listed(tokens: Tokens, rows: int) -> str:
    texts = [text for number, text in zip(tokens.ids, tokens.texts, strict=True) if number >= rows]
    return repr(texts) if all(texts) else "[...]"


def first_rows(model: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
    """The base's own rows, in fp32 by name: (tokens, width) for each table."""
    found = {}
    for path in tokens.tables:
        table = cast(nn.Parameter, table_of(model, path)).detach()
        found[tokens.key(path)] = table[torch.tensor(tokens.ids, device=table.device)].float()
    return found


def check_rows(model: nn.Module, tokens: Tokens, tensors: Mapping[str, Tensor], heads: Sequence[str]) -> None:
    """Refuses rows that do not fit their tables, and tables in a head that is trained whole."""
    require_rows(model, tokens)
    for path in tokens.tables:
        rows, table = tensors.get(tokens.key(path)), cast(nn.Parameter, table_of(model, path))
        wanted = (len(tokens.ids), table.shape[1])
        if rows is None or tuple(rows.shape) != wanted:
            have = "none" if rows is None else str(tuple(rows.shape))
            raise AdapterError(f"the adapter's rows for {path} are {have} and should be {wanted}.")
    check_heads(model, tokens, heads)


def check_heads(model: nn.Module, tokens: Tokens, heads: Sequence[str]) -> None:
    """Refuses tables that belong to a head which the adapter trains whole."""
    for path in tokens.tables:
        for owner, _ in owners(model, path):
            whole = next((head for head in heads if f"{owner}.".startswith(f"{head}.")), None)
            if whole is not None:
                raise AdapterError(f"head={whole!r} trains all rows of {path}, and tokens some of them: leave one out.")
