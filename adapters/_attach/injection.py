"""Prepends trained keys and values where transformers dispatches attention: no cache, no change of the config.

Prefix tuning (Li and Liang, 2021, arXiv 2101.00190, section 4.2) as keys and values that every query sees. It goes
past the key-value cache, so it works with gradient checkpointing, packing, encoders and every cache class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters._attach.container import CHILD, Container, KeyValue
from adapters._attach.state import STATE, State, after_copy, selection
from adapters._contract import KeyValueMethod
from adapters._dispatch import Attention, unwrap_attention, wrap_attention, wrapping_attention
from adapters._errors import AdapterError

Recorder = Callable[[nn.Module, Tensor, Tensor], None]
_users: set[int] = set()  # ids of the States that hold a prefix


def provide(state: State) -> None:
    """Routes attention through this module, from the first model that has a prefix on."""
    if id(state) not in _users:
        _users.add(id(state))
        weakref.finalize(state, _withdraw, id(state)).atexit = False  # a model that is dropped without being detached
    wrap_attention("prefix", _with_prefix)


def withdraw(state: State) -> None:
    """Undoes `provide`; after the last model the interface is transformers' own again."""
    _withdraw(id(state))


def _withdraw(state: int) -> None:
    _users.discard(state)
    if not _users:
        unwrap_attention("prefix")


@contextmanager
def recording(see: Recorder) -> Iterator[None]:
    """Calls `see(module, keys, values)` at each attention, keys (rows, heads, tokens, k_dim)."""

    def wrapper(attend: Attention, name: str) -> Attention:
        def recorded(module: nn.Module, *args: Any, **kw: Any) -> Any:
            given = dict(zip(_NAMES, args, strict=False)) | kw
            see(module, given["key"], given["value"])
            return attend(module, *args, **kw)

        return recorded

    with wrapping_attention(wrapper):
        yield


def _with_prefix(attend: Attention, name: str) -> Attention:
    def attention(module: nn.Module, *args: Any, **kw: Any) -> Any:
        prefix = acting_prefix(module)
        if prefix is None:
            return attend(module, *args, **kw)
        # models pass the mask by position or by name, some the queries, keys and values too
        given = dict(zip(_NAMES, args, strict=False))
        q, k, v, mask = (given.get(key, kw.pop(key, None)) for key in _NAMES)
        return _attend(attend, name, prefix, (module, q, k, v, mask), args[4:], kw)

    return attention


_NAMES = ("query", "key", "value", "attention_mask")


def acting_prefix(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Keys and values (heads, length, dim) of the acting adapters at this attention, or None."""
    state, held = module.__dict__.get(STATE), module._modules.get(CHILD)
    if state is None or not isinstance(held, Container):
        return None
    entries = (held._modules.get(adapter.slot) for adapter in selection(state))
    parts = [cast(tuple[Tensor, Tensor], entry()) for entry in entries if isinstance(entry, KeyValue)]
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat([k for k, _ in parts], -2), torch.cat([v for _, v in parts], -2)


def _attend(
    attend: Attention, name: str, prefix: tuple[Tensor, Tensor], call: tuple[Any, ...], args: Any, kw: dict[str, Any]
) -> Any:
    """softmax(q [P_k; k]^T) [P_v; v]: the prefix first, visible to every query."""
    module, q, k, v, mask = call
    pk, pv = (part.to(k.dtype)[None].expand(k.shape[0], -1, -1, -1) for part in prefix)
    length, queries = pk.shape[2], q.shape[2]
    if k.shape[1] != pk.shape[1]:  # this implementation was handed keys that are repeated for grouped queries
        groups = k.shape[1] // pk.shape[1]
        pk, pv = pk.repeat_interleave(groups, 1), pv.repeat_interleave(groups, 1)
    for key in ("indices", "block_indices"):
        if kw.get(key) is not None:
            raise AdapterError(f"this attention picks its keys by number ({key}), which a prefix would move.")
    causal = kw.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    bias = kw.get("position_bias")
    if bias is not None:  # (1 or rows, heads, queries, keys): no bias for the prefix
        kw["position_bias"] = F.pad(bias[..., -k.shape[2] :], (length, 0))
        if mask is None and causal and queries > 1:
            mask = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).tril_()[None, None]
    if mask is None and causal and queries > 1 and name != "eager":
        if kw.get("sliding_window") is not None and name.startswith("flash"):
            raise AdapterError(
                f"a prefix lies outside the sliding window of {name}: load the model with sdpa or eager."
            )
        # dummy queries for the prefix keep the kernel's causal path; a static cache's empty columns are cut off
        k, v = k[:, :, :queries], v[:, :, :queries]
        padded = torch.cat([q.new_zeros(*q.shape[:2], length, q.shape[3]), q], 2)
        output, weights = attend(module, padded, torch.cat([pk, k], 2), torch.cat([pv, v], 2), None, *args, **kw)
        return output[:, length:].contiguous(), weights
    if mask is not None:
        mask = _extended(mask, k.shape[2], length)
    return attend(module, q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), mask, *args, **kw)


def _extended(mask: Any, keys: int, length: int) -> Tensor:
    """The mask with `length` visible columns before its own: True in a boolean mask, 0 in an additive one."""
    if not isinstance(mask, Tensor):
        raise AdapterError(
            f"a prefix cannot extend a {type(mask).__name__}: load the model with sdpa or eager attention."
        )
    if mask.dim() == 2:  # (rows, keys), 1 where a key is visible
        return torch.cat([mask.new_ones(mask.shape[0], length), mask[:, :keys]], 1)
    mask = mask[..., :keys]
    if mask.shape[-1] != keys:
        mask = mask.expand(*mask.shape[:-1], keys)
    visible = torch.ones if mask.dtype == torch.bool else torch.zeros
    return torch.cat([visible(*mask.shape[:-1], length, dtype=mask.dtype, device=mask.device), mask], -1)


def _provide_again(state: State) -> None:
    if any(isinstance(adapter.method, KeyValueMethod) for adapter in state.adapters.values()):
        provide(state)


after_copy.append(_provide_again)
