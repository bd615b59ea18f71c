"""Prepends trained keys and values where transformers dispatches attention: no cache, no change of the config.

Prefix tuning (Li and Liang, 2021, arXiv 2101.00190, section 4.2) as keys and values that every query sees. It goes
past the key-value cache, so it works with gradient checkpointing, packing, encoders and every cache class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters._attach.container import CHILD, Container, KeyValue
from adapters._attach.state import STATE, State, selection
from adapters._errors import AdapterError

Attention = Callable[..., Any]
Recorder = Callable[[nn.Module, Tensor, Tensor], None]
_users: set[int] = set()  # ids of what needs the injection: States with a prefix, recordings under way
_original: list[Callable[..., Attention]] = []
_recorders: list[Recorder] = []


def provide(user: State | recording) -> None:
    """Routes attention through this module, from the first model that has a prefix on."""
    if id(user) not in _users:
        _users.add(id(user))
        weakref.finalize(user, _withdraw, id(user)).atexit = False  # a model that is dropped without being detached
    if not _original:
        from transformers.modeling_utils import AttentionInterface

        _original.append(AttentionInterface.get_interface)
        AttentionInterface.get_interface = _get_interface


def withdraw(user: State | recording) -> None:
    """Undoes `provide`; after the last user the interface is transformers' own again."""
    _withdraw(id(user))


def _withdraw(user: int) -> None:
    _users.discard(user)
    if not _users and _original:
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.get_interface = _original.pop()


class recording:
    """`with recording(see):` calls `see(module, keys, values)` at each attention, keys (rows, heads, tokens, k_dim)."""

    def __init__(self, see: Recorder) -> None:
        self.see = see

    def __enter__(self) -> None:
        provide(self)
        _recorders.append(self.see)

    def __exit__(self, *error: object) -> None:
        _recorders.remove(self.see)
        withdraw(self)


def _get_interface(self: Any, name: str, default: Attention) -> Attention:
    attend = _original[0](self, name, default)

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *args: Any, **kw: Any) -> Any:
        for see in _recorders:
            see(module, k, v)
        prefix = _prefix(module)
        if prefix is None:
            return attend(module, q, k, v, mask, *args, **kw)
        return _attend(attend, name or "eager", prefix, (module, q, k, v, mask), args, kw)

    return attention


def _prefix(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Keys and values (heads, length, dim) of the acting adapters at this attention, or None."""
    state, held = module.__dict__.get(STATE), module._modules.get(CHILD)
    if state is None or not isinstance(held, Container):
        return None
    entries = (held._modules.get(adapter.slot) for adapter in selection(state))
    parts = [cast(tuple[Tensor, Tensor], entry()) for entry in entries if isinstance(entry, KeyValue)]
    if not parts:
        return None
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
    causal = kw.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
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
