"""The one place where transformers' attention dispatch is changed, and changed back.

While anything is registered here, each attention function that `AttentionInterface.get_interface` returns is wrapped.
Registrations come and go in any order, also from the garbage collector; with the last one the interface is
transformers' own again.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
import torch._guards

Attention = Callable[..., Any]  # (module, query, key, value, attention_mask, ...) -> (output, weights)
OPERANDS = ("query", "key", "value", "attention_mask")  # the names of its first arguments after the module
Wrapper = Callable[[Attention, str], Attention]  # of an attention and its name

_wrappers: dict[str, Wrapper] = {}
_outermost: dict[str, Wrapper] = {}  # those that see a call before all others
# both, as what is traced reads them: they may change while a compiler looks, with a garbage collection
_applied: tuple[Wrapper, ...] = ()
_owners: dict[str, set[int]] = defaultdict(set)  # ids of what asked for a wrapper, by its key
_late: list[tuple[int, str]] = []  # owners that were collected while something was compiled, with their keys
_transformers_own: list[Callable[..., Attention]] = []  # filled once; what is under way may still need it
_lock = RLock()


def wrap_attention(key: str, wrapper: Wrapper, outermost: bool = False) -> None:
    """Wraps every attention from now on; the same key again changes nothing.

    Args:
        outermost: around the wrappers that are not, whichever came first.
    """
    from transformers.modeling_utils import AttentionInterface

    with _lock:
        if not _transformers_own:
            _transformers_own.append(AttentionInterface.get_interface)
        (_outermost if outermost else _wrappers).setdefault(key, wrapper)
        _apply()
        AttentionInterface.get_interface = _get_interface


def unwrap_attention(key: str) -> None:
    """Undoes `wrap_attention`."""
    with _lock:
        found = _wrappers.pop(key, None) or _outermost.pop(key, None)
        _apply()
        if found is None or _applied:
            return
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.get_interface = _transformers_own[0]


def wrap_while(owner: object, key: str, wrapper: Wrapper, outermost: bool = False) -> None:
    """As `wrap_attention`, until the last owner of the key is gone or calls `release`."""
    if id(owner) not in _owners[key]:
        _owners[key].add(id(owner))
        weakref.finalize(owner, _collected, id(owner), key).atexit = False
        wrap_attention(key, wrapper, outermost)


def release(owner: object, key: str) -> None:
    """Undoes `wrap_while`."""
    _release(id(owner), key)


def _collected(owner: int, key: str) -> None:
    """An owner is gone: at once, or, where this thread is compiling what it has read here, with the next call."""
    if torch._guards.CompileContext.try_get() is None:
        _release(owner, key)
    else:
        _late.append((owner, key))


def _release(owner: int, key: str) -> None:
    _owners[key].discard(owner)
    if not _owners[key]:
        unwrap_attention(key)


def _apply() -> None:
    global _applied
    _applied = (*_wrappers.values(), *_outermost.values())


@contextmanager
def wrapping_attention(wrapper: Wrapper) -> Iterator[None]:
    """Wraps every attention inside the block."""
    key = f"block {id(wrapper)}"
    wrap_attention(key, wrapper)
    try:
        yield
    finally:
        unwrap_attention(key)


def _get_interface(self: Any, name: str, default: Attention) -> Attention:
    if not torch.compiler.is_compiling():
        while _late:
            _release(*_late.pop())
    attend = _transformers_own[0](self, name, default)
    for wrapper in _applied:
        attend = wrapper(attend, name or "eager")
    return attend
