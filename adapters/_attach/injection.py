"""Prepends trained keys and values where transformers dispatches attention: no cache, no change of the config.

Prefix tuning (Li and Liang, 2021, arXiv 2101.00190, section 4.2) as keys and values that every query sees. It goes
past the key-value cache, so it works with gradient checkpointing, packing, encoders and every cache class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters._attach.acting import UNKNOWN_ROWS, Chain
from adapters._attach.batches import Repeated
from adapters._attach.container import CHILD, Container, KeyValue
from adapters._attach.per_row import PerRow
from adapters._attach.prefixes import Prefixes, prefixes_of
from adapters._attach.state import SHAPE, STATE, State, after_copy, notes, selection, tables
from adapters._contract import KeyValueMethod
from adapters._dispatch import OPERANDS, Attention, release, wrap_while, wrapping_attention
from adapters._errors import AdapterError

Recorder = Callable[[nn.Module, Tensor, Tensor], None]
_KEY = "prefix"


def provide(state: State) -> None:
    """Routes attention through this module, from the first model that has a prefix on."""
    wrap_while(state, _KEY, _with_prefix)


def withdraw(state: State) -> None:
    """Undoes `provide`; after the last model the interface is transformers' own again."""
    release(state, _KEY)


@contextmanager
def recording(see: Recorder) -> Iterator[None]:
    """Calls `see(module, keys, values)` at each attention, keys (rows, heads, tokens, k_dim)."""

    def wrapper(attend: Attention, name: str) -> Attention:
        def recorded(module: nn.Module, *args: Any, **kw: Any) -> Any:
            given = dict(zip(OPERANDS, args, strict=False)) | kw
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
        given = dict(zip(OPERANDS, args, strict=False))
        q, k, v, mask = (given.get(key, kw.pop(key, None)) for key in OPERANDS)
        return _attend(attend, name, prefix, (module, q, k, v, mask), args[4:], kw)

    attention.__dict__["__wrapped__"] = attend
    return attention


def without_prefix(attend: Attention, module: nn.Module) -> Attention:
    """What `attend` comes down to at an attention where no prefix acts."""
    inner: Attention | None = getattr(attend, "__wrapped__", None)
    return attend if inner is None or acting_prefix(module) is not None else inner


def acting_prefix(module: nn.Module) -> Prefixes | None:
    """What the acting adapters prepend at this attention, or None."""
    state, held = module.__dict__.get(STATE), module._modules.get(CHILD)
    if state is None or not isinstance(held, Container) or tables(state) is not None:
        return None
    if not any(isinstance(entry, KeyValue) for entry in held._modules.values()):
        return None
    acting = selection(state)
    entries: dict[str, KeyValue] = {}
    for adapter in acting:
        entry = held._modules.get(adapter.slot)
        if isinstance(entry, KeyValue):
            entries[adapter.slot] = entry
    if not entries:
        return None
    if isinstance(acting.node, PerRow | Repeated) and not torch.compiler.is_compiling():
        shape = notes(state).get(SHAPE)
        if shape is None or isinstance(acting.node, Repeated) or shape.rows != len(acting.node.parts):
            raise AdapterError(UNKNOWN_ROWS)
    return prefixes_of(acting.node if acting.node is not None else Chain(tuple(acting)), entries)


def _attend(
    attend: Attention, name: str, prefix: Prefixes, call: tuple[Any, ...], args: Any, kw: dict[str, Any]
) -> Any:
    """softmax(q [P_k; k]^T) [P_v; v]: the prefix first, visible to every query."""
    module, q, k, v, mask = call
    pk, pv = prefix.for_batch(k)
    length, queries = pk.shape[2], q.shape[2]
    if prefix.visible is not None and mask is None:
        mask = _everything(q, k, name, causal=queries > 1 and _is_causal(module, kw))
    if k.shape[1] != pk.shape[1]:  # this implementation was handed keys that are repeated for grouped queries
        groups = k.shape[1] // pk.shape[1]
        pk, pv = pk.repeat_interleave(groups, 1), pv.repeat_interleave(groups, 1)
    for key in ("indices", "block_indices"):
        if kw.get(key) is not None:
            raise AdapterError(f"this attention picks its keys by number ({key}), which a prefix would move.")
    causal = _is_causal(module, kw)
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
        mask = _extended(mask, k.shape[2], length, prefix.hidden(k))
    return attend(module, q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), mask, *args, **kw)


def _is_causal(module: nn.Module, kw: dict[str, Any]) -> bool:
    given = kw.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _everything(q: Tensor, k: Tensor, name: str, causal: bool) -> Tensor:
    """The mask that stands for none: of a kernel, all keys, or those up to each query."""
    if name.startswith("flash"):
        return torch.ones(k.shape[0], k.shape[2], dtype=torch.long, device=k.device)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
    if causal and name != "eager":
        visible = visible.tril_()
    if name == "eager":  # which adds its mask
        return torch.zeros(1, 1, *visible.shape, dtype=q.dtype, device=q.device)
    return visible[None, None]


def _extended(mask: Any, keys: int, length: int, hidden: Tensor | None) -> Tensor:
    """The mask with `length` columns before its own, visible but where `hidden` (rows, length) says otherwise.

    Visible is True in a boolean mask, 0 in an additive one.
    """
    if not isinstance(mask, Tensor):
        raise AdapterError(
            f"a prefix cannot extend a {type(mask).__name__}: load the model with sdpa or eager attention."
        )
    if mask.dim() == 2:  # (rows, keys), 1 where a key is visible
        columns = mask.new_ones(mask.shape[0], length)
        columns = columns if hidden is None else columns.masked_fill(hidden, 0)
        return torch.cat([columns, mask[:, :keys]], 1)
    mask = mask[..., :keys]
    if mask.shape[-1] != keys:
        mask = mask.expand(*mask.shape[:-1], keys)
    visible = torch.ones if mask.dtype == torch.bool else torch.zeros
    if hidden is not None:
        mask = mask.expand(hidden.shape[0], *mask.shape[1:])
    columns = visible(*mask.shape[:-1], length, dtype=mask.dtype, device=mask.device)
    if hidden is not None:
        no = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        columns = columns.masked_fill(hidden[:, None, None, :], no)
    return torch.cat([columns, mask], -1)


def _provide_again(state: State) -> None:
    if any(isinstance(adapter.method, KeyValueMethod) for adapter in state.adapters.values()):
        provide(state)


after_copy.append(_provide_again)
