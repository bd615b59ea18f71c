"""What a prefix starts as: the keys and values that the base itself computes for some text.

A prefix that starts from text behaves at step 0 as that text would in front of every input; random keys and values
start far worse than the base. Positions: the text is run at -length, ..., -1, so that the real tokens keep theirs.
Where positions cannot be negative (learned position embeddings) it runs at 0, ..., length - 1 and the real tokens
move, if the model is causal and takes position ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from adapters._attach.injection import recording
from adapters._attach.positions import forward_parameters
from adapters._attach.state import State, holding, state_of
from adapters._attach.swap import base_class
from adapters._contract import KeyValueMethod, KeyValueSite, Method
from adapters._errors import AdapterError
from adapters._evaluating import evaluating

Recorded = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Start:
    """The method with its length and positions settled, the tensors it starts from, and what was done in words."""

    method: Method
    recorded: Recorded
    note: str


def prefix_start(model: nn.Module, method: KeyValueMethod, sites: Iterable[KeyValueSite], tokenizer: Any) -> Start:
    """Keys (heads, length, k_dim) and values (heads, length, v_dim) for each site, from the method's start."""
    sites = tuple(sites)
    ids, note = _tokens(model, method, tokenizer)
    positions = method.positions
    takes_positions = "position_ids" in forward_parameters(base_class(model))
    if positions == "before" and takes_positions and all(site.causal for site in sites):
        try:
            recorded = _record(model, sites, ids, -ids.shape[1])
        except _Negative:
            positions = "shifted"
            note += "; this model embeds positions, so the real tokens move behind the prefix (positions='shifted')"
            recorded = _record(model, sites, ids, 0)
    else:
        recorded = _record(model, sites, ids, None)
    settled = replace(method, length=ids.shape[1], positions=positions)
    return Start(settled, recorded, note)


def _tokens(model: nn.Module, method: KeyValueMethod, tokenizer: Any) -> tuple[Tensor, str]:
    start, device = method.start(), next(model.parameters()).device
    if isinstance(start, int):
        token = _neutral(model)
        return torch.full((1, start), token, device=device), f"starts as {start} times the neutral token {token}"
    if tokenizer is None:
        raise AdapterError(
            "a prefix that starts from text needs the model's tokenizer: attach(..., tokenizer=tokenizer)."
        )
    ids = tokenizer(start, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
    if ids.shape[1] == 0:
        raise AdapterError("the text a prefix starts from is empty: give some text, or a length.")
    wanted = method.length
    if wanted > ids.shape[1]:
        raise AdapterError(f"the text has {ids.shape[1]} tokens and length is {wanted}: leave length out, or lower it.")
    kept = ids[:, : wanted or None]
    cut = f", the first {kept.shape[1]} kept" if kept.shape[1] < ids.shape[1] else ""
    return kept, f"starts from a text of {ids.shape[1]} tokens{cut}"


def _neutral(model: nn.Module) -> int:
    """The beginning-of-text token, which attention rests on; else the classifier, end, padding token, or 0."""
    config = getattr(model, "config", None)
    for name in ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and 0 <= token < int(getattr(config, "vocab_size", token + 1)):
            return token
    return 0


class _Negative(Exception):
    """A negative position was looked up in a table."""


class _NoNegativeLookup(TorchFunctionMode):
    """Raises before a table is indexed with a negative number: on a GPU the lookup itself would end the process."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKUPS:
            # what is looked up may be negative itself; only indices may not. F.embedding takes the index first
            for index in _integers((args[:1] if func is F.embedding else args[1:], tuple(kwargs.values()))):
                if index.numel() and bool((index < 0).any()):
                    raise _Negative
        return func(*args, **kwargs)


_LOOKUPS = (F.embedding, torch.embedding, torch.Tensor.__getitem__, torch.index_select, torch.gather)


def _integers(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)]


def _record(model: nn.Module, sites: tuple[KeyValueSite, ...], ids: Tensor, first: int | None) -> Recorded:
    paths = {id(model.get_submodule(site.path)): site.path for site in sites}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(module: nn.Module, keys: Tensor, values: Tensor) -> None:
        if id(module) in paths:
            found.setdefault(paths[id(module)], (keys[0].float(), values[0].float()))

    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if first is not None:
        inputs["position_ids"] = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    if "decoder_input_ids" in forward_parameters(base_class(model)):
        inputs["decoder_input_ids"] = ids  # an encoder-decoder model: the text on both sides
    if "use_cache" in forward_parameters(base_class(model)) or hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    with evaluating(model), holding(state_of(model) or State(), ()), recording(see), _NoNegativeLookup():
        model(**inputs)
    missing = [site.path for site in sites if site.path not in found]
    if missing:
        raise AdapterError(f"no keys and values reached the attention interface at {missing[0]}.")
    return found
