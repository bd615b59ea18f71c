"""Attention inside each document of a packed row, instead of over all pairs of the row's tokens.

A row of documents with n_1, n_2, ... tokens needs sum n_i^2 scores; with a block-diagonal mask attention computes
(sum n_i)^2 and throws most of them away. The lengths travel with the inputs under the names that transformers gives
them for its variable-length kernels (`cu_seq_lens_q`, ...): where such a kernel is chosen it reads them itself, and
otherwise what is here splits the row at transformers' attention dispatch. They are arguments of every layer, so that
activation checkpointing finds them again when it recomputes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach.injection import without_prefix
from adapters._dispatch import OPERANDS, Attention, wrap_while
from adapters.train.within import attend_within

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_KEY = "documents"
_OWN = "documents"  # on lengths that were made here: those of other trainers are none of ours
_watchers: list[Callable[[], None]] = []


def lengths_of(position_ids: Tensor) -> dict[str, Any]:
    """Arguments that say where the documents of one row begin; `position_ids` (1, tokens) restart with each at 0.

    `cu_seq_lens_q` (documents + 1,) int32 counts the tokens before each document, as in FlashAttention's varlen call.
    """
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    ends = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(torch.int32)
    longest = int(ends.diff().max())
    ends.__dict__[_OWN] = ends.tolist()
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def split_rows(owner: object) -> None:
    """While `owner` lives, attention that is told the documents of a row is computed for each; others are as before."""
    wrap_while(owner, _KEY, _wrapper, outermost=True)


@contextmanager
def splitting(see: Callable[[], None]) -> Iterator[None]:
    """Splits rows inside the block, and calls `see` at each attention that knew its documents."""
    owner = _Block()
    split_rows(owner)
    _watchers.append(see)
    try:
        yield
    finally:
        _watchers.remove(see)


class _Block:
    pass


def _wrapper(attend: Attention, name: str) -> Attention:
    def attention(module: nn.Module, *args: Any, **kw: Any) -> Any:
        ends = None if torch.compiler.is_compiling() else getattr(kw.get("cu_seq_lens_q"), _OWN, None)
        if ends is None:
            return attend(module, *args, **kw)
        if "flash" in name:
            _tell()
            return attend(module, *args, **kw)
        # models pass the mask by position or by name, some the queries, keys and values too
        q, k, v, mask = _four(dict(zip(OPERANDS, args, strict=False)) | kw)
        if not _can_split(q, k, mask, ends, kw):
            return attend(module, *args, **kw)
        _tell()
        rest = {key: value for key, value in kw.items() if key not in (*OPERANDS, *_LENGTHS)}
        inside = attend_within(without_prefix(attend, module), module, (q, k, v, mask), ends, args[4:], rest)
        if inside is not None:
            return inside, None
        if len(ends) == 2:
            return attend(module, *args, **kw)
        parts = []
        for start, end in pairwise(ends):
            at = slice(start, end)
            one = (q[:, :, at], k[:, :, at], v[:, :, at], mask[..., at, at])
            parts.append(attend(module, *one, *args[4:], **rest)[0])
        return torch.cat(parts, 1), None  # (1, tokens, heads, dim)

    return attention


def _four(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
    return given["query"], given["key"], given["value"], given.get("attention_mask")


def _can_split(q: Tensor, k: Tensor, mask: Any, ends: list[int], kw: dict[str, Any]) -> bool:
    """One row, all of it here, under a mask whose parts are the documents' own; nothing else that goes by token pairs.

    On accelerators one call with a mask is quicker than a call for each document.
    """
    whole = q.shape[0] == 1 and q.shape[2] == k.shape[2] == ends[-1] and q.device.type == "cpu"
    if mask is None:
        apart = len(ends) == 2  # else nothing says that the documents are to be apart
    else:
        apart = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == (ends[-1], ends[-1])
    return whole and apart and kw.get("position_bias") is None and kw.get("cache") is None


def _tell() -> None:
    for see in tuple(_watchers):
        see()
