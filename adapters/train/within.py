"""Softmax attention inside each document of a row by plain matrix products, which keeps no scores for backward.

    p = softmax(s q k^T + mask);  o = p v

On CPUs, torch's fused attention takes longer than these products up to about a thousand tokens a document, in 16 bits
twice as long. As there, backward computes the scores again (Dao et al., 2022, arXiv 2205.14135, section 3.1):

    dv = p^T do;  dp = do v^T;  ds = p (dp - sum(do * o));  dq = s ds k;  dk = s ds^T q
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adapters._dispatch import Attention

LONGEST = 1024  # tokens of a document
BLOCK = 96  # queries that are multiplied at a time


def attend_within(
    attend: Attention, module: nn.Module, call: tuple[Any, ...], ends: list[int], args: Any, kw: dict[str, Any]
) -> Tensor | None:
    """What transformers' `sdpa_attention_forward` returns, (1, tokens, heads, dim), computed document by document.

    Args:
        attend: the attention that was chosen; None is returned for any but that one, or with dropout, or where a
            document is too long.
        call: query (1, heads, tokens, dim), key and value (1, their heads, tokens, dim), and a mask
            (1, 1, tokens, tokens): True where a query sees a key, or what is added to the score; None: causal or not,
            as the module is.
        ends: where documents begin, and the end of the last.
        args, kw: what else the attention was given.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v, mask = call
    longest = max(end - start for start, end in pairwise(ends))
    # `args` may hold a dropout, and an argument that is not known here may mean anything
    if attend is not sdpa_attention_forward or args or kw.get("dropout") or longest > LONGEST:
        return None
    same = q.dtype == k.dtype == v.dtype and q.shape[1] % k.shape[1] == 0 and k.shape[1] == v.shape[1]
    if mask is None:
        causal = kw.get("is_causal")
        mask = torch.ones(1, 1, ends[-1], ends[-1], dtype=torch.bool)
        mask = mask.tril() if (getattr(module, "is_causal", True) if causal is None else causal) else mask
    if not same or mask.requires_grad or mask.shape[:2] != (1, 1):
        return None
    scale = kw.get("scaling")
    out: Tensor = _Within.apply(q, k, v, mask, ends, q.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
    return out


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ends: list[int], scale: float) -> Tensor:
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[-1])
        blocks = [_blocks(mask, start, end) for start, end in pairwise(ends)]
        for document in blocks:
            for queries, seen in document:
                p = _chances(_grouped(q, k, queries), _part(k, seen), mask[0, 0, queries, seen], scale)
                _put(out.transpose(1, 2), queries, torch.bmm(p, _part(v, seen)))
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out = ctx.saved_tensors
        d_q, d_k, d_v = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        outer, outs = d_out.transpose(1, 2), out.transpose(1, 2)
        for document in ctx.blocks:
            whole = slice(document[0][0].start, document[-1][0].stop)
            d_ks, d_vs = (torch.zeros_like(_part(x, whole)) for x in (k, v))
            for queries, seen in document:
                qs, ks, vs = _grouped(q, k, queries), _part(k, seen), _part(v, seen)
                ds, os = _grouped(outer, k, queries), _grouped(outs, k, queries)
                p = _chances(qs, ks, mask[0, 0, queries, seen], ctx.scale)
                keys = slice(0, seen.stop - seen.start)
                d_vs[:, keys].add_(torch.bmm(p.mT, ds))
                d_p = torch.bmm(ds, vs.mT).sub_((ds * os).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
                _put(d_q, queries, torch.bmm(d_p, ks))
                d_ks[:, keys].add_(torch.bmm(d_p.mT, qs))
            _put(d_k, whole, d_ks)
            _put(d_v, whole, d_vs)
        return d_q, d_k, d_v, None, None, None


def _blocks(mask: Tensor, start: int, end: int) -> list[tuple[slice, slice]]:
    """The queries of a document, some at a time, each time with its keys up to the last that one of them may see.

    Under a causal mask, a third of the pairs of a long document is spared.
    """
    found = []
    for first in range(start, end, BLOCK):
        last = min(first + BLOCK, end)
        # a document's last, short block goes along with the one before
        last = end if end - last < BLOCK // 2 else last
        sees_later = last < end and (mask.dtype != torch.bool or bool(mask[0, 0, first:last, last:end].any()))
        found.append((slice(first, last), slice(start, end if sees_later else last)))
        if last == end:
            break
    return found


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x


def _part(x: Tensor, at: slice) -> Tensor:
    """One document: (heads, its tokens, dim), scores and sums in fp32 at least."""
    return _wide(x[0, :, at])


def _grouped(q: Tensor, k: Tensor, at: slice) -> Tensor:
    """The queries that share a head of `k` below each other: (heads of k, group * tokens, dim)."""
    part = _part(q, at)
    return part.reshape(k.shape[1], -1, part.shape[-1])


def _put(into: Tensor, at: slice, part: Tensor) -> None:
    target = into[0, :, at]
    target.copy_(part.view(target.shape))


def _chances(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(s q k^T + mask): (heads of k, group * tokens, tokens)."""
    scores = torch.bmm(q, k.mT).mul_(scale)
    by_head = scores.view(scores.shape[0], -1, *mask.shape)
    if mask.dtype == torch.bool:
        by_head.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        by_head.add_(mask)
    return torch.softmax(scores, -1)
