"""The rows of tokens as PEFT's `trainable_token_indices`, whose values also replace the base's (PEFT 0.21)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach import Tokens, owners, table_paths
from adapters._contract import Site, WeightSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.files import PeftFiles
from adapters._interop.folder import CONFIG, PREFIX
from adapters._interop.targets import base_modules, shortest, suffix_of

PART = "token_adapter.trainable_tokens_delta"


def with_tokens(model: nn.Module, files: PeftFiles, sites: Sequence[Site], tokens: Tokens) -> PeftFiles | str:
    """`files` with the rows of tokens, or the reason why PEFT has no words for them."""
    config, modules = json.loads(files.config), base_modules(model)
    if config["peft_type"] != "LORA":
        return "PEFT trains rows of tokens beside LoRA only"
    indices, keys = {}, {}
    for table in tokens.tables:
        held = [owner for owner, _ in owners(model, table)]
        reason = _reason(model, modules, held, table, sites)
        name = shortest({held[0]}, modules)
        if reason or name is None:
            return reason or f"no name means {held[0]} alone"
        indices[name[0]] = list(tokens.ids)
        keys[tokens.key(table)] = f"{PREFIX}{held[0]}.{PART}"
    text = json.dumps({**config, "trainable_token_indices": indices}, indent=2, sort_keys=True) + "\n"
    return replace(files, config=text.encode(), keys={**files.keys, **keys})


def take_tokens(
    config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module
) -> tuple[Tokens | None, dict[str, Tensor]]:
    """Takes the rows of `trainable_token_indices` out of a file's tensors: whose they are, and the rows by our names.

    Raises:
        AdapterError: they are of another table than a model's tokens have, or differ from table to table.
        DamagedAdapter: they are missing, or of another shape than the configuration says.
    """
    named = config.get("trainable_token_indices")
    if not named:
        return None, {}
    paths, modules = table_paths(model), base_modules(model)
    held = {path: [owner for owner, _ in owners(model, path)] for path in paths}
    if not isinstance(named, Mapping):  # a list means the input embeddings
        named = {held[paths[0]][0]: named}
    ids: list[int] = []
    rows: dict[str, Tensor] = {}
    for name, indices in named.items():
        table = next((path for path in paths if any(suffix_of(str(name), owner) for owner in held[path])), None)
        if table is None:
            raise AdapterError(f"{CONFIG} trains rows of {name}, which is no table of this model's tokens.")
        reason = _reason(model, modules, held[table], table, ())
        if reason:  # what it computes is then another function than ours
            raise AdapterError(f"the folder trains rows of tokens, and {reason}.")
        given = [int(index) for index in indices]
        if ids and sorted(given) != sorted(ids):
            raise AdapterError(f"{CONFIG} trains rows of other tokens in {name} than before; one set holds here.")
        ids = ids or given
        key = next((key for owner in held[table] if (key := f"{PREFIX}{owner}.{PART}") in tensors), None)
        if key is not None:
            order = torch.tensor(sorted(range(len(given)), key=given.__getitem__))
            rows[table] = _rows(tensors.pop(key), given, order, name)
        elif table not in rows:
            raise DamagedAdapter(f"the file lacks the rows of {name}, which {CONFIG} trains.")
    tables = tuple(path for path in paths if path in rows)
    tokens = Tokens(tuple(sorted(ids)), ("",) * len(ids), tables)
    return tokens, {tokens.key(path): rows[path] for path in tables}


def _rows(found: Tensor, ids: Sequence[int], order: Tensor, name: str) -> Tensor:
    """The rows by ascending number of their tokens."""
    if found.dim() != 2 or found.shape[0] != len(ids) or len(set(ids)) < len(ids):
        raise DamagedAdapter(f"the rows of {name} are {list(found.shape)}, and {CONFIG} names {len(ids)} tokens.")
    return found[order].contiguous()


def _reason(model: nn.Module, modules: dict[str, nn.Module], held: list[str], table: str, sites: Sequence[Site]) -> str:
    adapted = {site.owner for site in sites if isinstance(site, WeightSite)}
    twice = next((owner for owner in held if owner in adapted), None)
    if twice is not None:
        return f"PEFT adapts {twice} or trains rows of it, and not both"
    for owner in held:
        linear = isinstance(modules[owner], nn.Linear)
        if not linear and not isinstance(modules[owner], nn.Embedding):
            return f"PEFT trains no rows of a {type(modules[owner]).__name__}, as {owner} is"
        if linear and getattr(modules[owner], "bias", None) is not None:
            return f"PEFT drops the bias of {owner} where it trains rows of it"
    said = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if len(held) > 1 and not said:
        return f"{table} is tied, and the model's configuration does not say so, which PEFT goes by"
    return ""
