"""The rows of tokens as PEFT's `trainable_token_indices`, whose values also replace the base's (PEFT 0.21)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach import Tokens, owners, table_paths
from adapters._attach.inputs import input_embeddings
from adapters._attach.swap import base_class
from adapters._contract import Site, WeightSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._heads import output_embeddings
from adapters._interop.files import PeftFiles
from adapters._interop.folder import CONFIG, PREFIX
from adapters._interop.targets import base_modules, suffix_of

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
        name = _name(held[0], modules)
        if reason or name is None:
            return reason or f"no name means {held[0]} alone"
        indices[name] = list(tokens.ids)
        keys[tokens.key(table)] = f"{PREFIX}{held[0]}.{PART}"
    text = json.dumps({**config, "trainable_token_indices": indices}, indent=2, sort_keys=True) + "\n"
    return replace(files, config=text.encode(), keys={**files.keys, **keys})


def _name(owner: str, modules: Collection[str]) -> str | None:
    """The shortest end of a path that means this module alone: here PEFT compares ends, dot or no dot."""
    parts = owner.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
    return next((end for end in ends if [path for path in modules if path.endswith(end)] == [owner]), None)


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
    met: dict[str, list[str]] = {}
    rows: dict[str, Tensor] = {}
    for name, indices in named.items():
        given = _numbers(indices)
        owner = _meant(str(name), [owner for path in paths for owner in held[path]])
        table = next(path for path in paths if owner in held[path])
        reason = _reason(model, modules, held[table], table, ())
        if reason:  # what it computes is then another function than ours
            raise AdapterError(f"the folder trains rows of tokens, and {reason}.")
        # of a tied table, PEFT ties two names only where their lists are equal, order and all
        alike = given == ids if table in met else sorted(given) == sorted(ids)
        if ids and not alike:
            raise AdapterError(f"{CONFIG} trains rows of other tokens in {name} than before; one set holds here.")
        ids = ids or given
        met.setdefault(table, []).append(owner)
        key = f"{PREFIX}{owner}.{PART}"
        if table not in rows and key in tensors:
            rows[table] = _rows(tensors.pop(key), given, name)
    for table, found in met.items():
        if held[table][0] not in found:
            raise AdapterError(f"the folder trains rows at {found[0]} alone, which is tied to {held[table][0]} here.")
        if table not in rows:
            raise DamagedAdapter(f"the file lacks the rows of {found[0]}, which {CONFIG} trains.")
    tables = tuple(path for path in paths if path in rows)
    tokens = Tokens(tuple(sorted(ids)), ("",) * len(ids), tables)
    return tokens, {tokens.key(path): rows[path] for path in tables}


def _numbers(indices: Any) -> list[int]:
    plain = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
    if not plain or not indices or len(set(indices)) < len(indices):
        raise DamagedAdapter(
            f"{CONFIG} sets trainable_token_indices to {str(indices)[:60]}, no list of tokens' numbers."
        )
    return list(indices)


def _meant(name: str, known: Sequence[str]) -> str:
    """The one of the tables' owners that a name ends."""
    found = [owner for owner in known if suffix_of(name, owner)]
    if len(found) != 1:
        what = "no table" if not found else f"{' and '.join(found)}, more than one table"
        raise AdapterError(f"{CONFIG} trains rows of {name}, which is {what} of this model's tokens.")
    return found[0]


def _rows(found: Tensor, ids: Sequence[int], name: str) -> Tensor:
    """The rows by ascending number of their tokens."""
    if found.dim() != 2 or found.shape[0] != len(ids):
        raise DamagedAdapter(f"the rows of {name} are {list(found.shape)}, and {CONFIG} names {len(ids)} tokens.")
    return found[torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))].contiguous()


def _reason(model: nn.Module, modules: dict[str, nn.Module], held: list[str], table: str, sites: Sequence[Site]) -> str:
    adapted = {site.owner for site in sites if isinstance(site, WeightSite)}
    twice = next((owner for owner in held if owner in adapted), None)
    if twice is not None:
        return f"PEFT adapts {twice} or trains rows of it, and not both"
    for owner in held:
        module = modules[owner]
        if not isinstance(module, nn.Linear) and not _is_table(module):
            return f"PEFT trains no rows of a {base_class(module).__name__}, as {owner} is, or not as it computes them"
        if isinstance(module, nn.Linear) and getattr(module, "bias", None) is not None:
            return f"PEFT drops the bias of {owner} where it trains rows of it"
    return _tied(model, modules, held, table) if len(held) > 1 else ""


def _is_table(module: nn.Module) -> bool:
    """A lookup as torch does it, or one times the scale that PEFT takes along."""
    plain = base_class(module).forward is nn.Embedding.forward
    return isinstance(module, nn.Embedding) and (plain or hasattr(module, "embed_scale"))


def _tied(model: nn.Module, modules: Mapping[str, nn.Module], held: Sequence[str], table: str) -> str:
    """PEFT ties what the configuration says is tied: the input and the output embeddings, of the model as a whole."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return f"{table} is tied, and the model's configuration does not say so, which PEFT goes by"
    ends = [next(input_embeddings(model), None), output_embeddings(model)]
    if len(held) != 2 or [modules[owner] for owner in held] != ends:
        return f"{table} is shared by {', '.join(held)}, of which PEFT trains the input and output embeddings alone"
    return ""
