"""The rows of tokens as PEFT's `trainable_token_indices`, whose values also replace the base's (PEFT 0.21)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from adapters._attach import Tokens, owners
from adapters._contract import Site, WeightSite
from adapters._interop.folder import PREFIX
from adapters._interop.peft_write import PeftFiles
from adapters._interop.targets import base_modules, shortest

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
