"""Attention inside the documents of a row, against the definition and against a dense mask."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

import adapters
from adapters import _dispatch
from adapters.train import within
from adapters.train.batches import OneRow
from adapters.train.documents import lengths_of, split_rows, splitting
from adapters.train.loss import score
from adapters.train.packing import restarting
from adapters.train.within import LONGEST, attend_within

LENGTHS = [3, 7, 1, 5]
ENDS = [0, 3, 10, 11, 16]
TOKENS = 16


def operands(dtype: torch.dtype, heads: int = 6, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, TOKENS, heads, 8), (1, TOKENS, kv_heads, 8), (1, TOKENS, kv_heads, 5))  # as layers make them
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]
    return tuple(x.requires_grad_() for x in made)


def masks() -> dict[str, torch.Tensor]:
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(TOKENS)
    causal = (document[:, None] == document) & (place[:, None] >= place)
    window = causal & (place[:, None] - place < 3)
    both = document[:, None] == document
    bias = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    added = bias.masked_fill(~causal, torch.finfo(torch.float32).min)
    return {
        name: mask[None, None]
        for name, mask in {"causal": causal, "window": window, "both directions": both, "additive": added}.items()
    }


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Over all pairs of the row, head by head."""
    groups = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = scale * q[0, head] @ k[0, head // groups].T
        scores = scores.masked_fill(~mask[0, 0], -torch.inf) if mask.dtype == torch.bool else scores + mask[0, 0]
        heads.append(torch.softmax(scores, -1) @ v[0, head // groups])
    return torch.stack(heads, 1)[None]


@pytest.mark.parametrize("block", [2, 3, 96])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_a_document_attends_by_the_definition(
    mask: str, heads: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(within, "BLOCK", block)
    q, k, v = operands(torch.float64, *heads)
    chosen = masks()[mask]
    found = attend_within(sdpa_attention_forward, nn.Module(), (q, k, v, chosen), ENDS, (), {"scaling": 0.3})
    assert found is not None
    expected = by_definition(q, k, v, chosen, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_in_16_bits_it_is_nearer_to_the_truth_than_torch() -> None:
    exact = operands(torch.float64)
    q, k, v = operands(torch.bfloat16)
    mask = masks()["causal"]
    rounded = [x.detach().double() for x in (q, k, v)]
    truth = by_definition(*rounded, mask, 0.3)
    found = attend_within(sdpa_attention_forward, nn.Module(), (q, k, v, mask), ENDS, (), {"scaling": 0.3})
    assert found is not None
    grouped = [x.repeat_interleave(3, 1) for x in (k, v)]
    torch_own = F.scaled_dot_product_attention(q, *grouped, mask, scale=0.3).transpose(1, 2)
    assert (found.double() - truth).norm() <= 1.01 * (torch_own.double() - truth).norm()
    assert (found.double() - truth).norm() < 0.01 * truth.norm()
    assert exact[0].dtype == torch.float64


def test_what_it_does_not_know_is_left_to_transformers() -> None:
    q, k, v = operands(torch.float32)
    mask = masks()["causal"]

    def tried(attend: Any = sdpa_attention_forward, mask: Any = mask, args: Any = (), **kw: Any) -> Any:
        return attend_within(attend, nn.Module(), (q, k, v, mask), ENDS, args, kw)

    assert tried() is not None
    assert tried(attend=lambda *_: None) is None
    assert tried(dropout=0.1) is None
    assert tried(args=(0.0,)) is None
    assert tried(mask=masks()["additive"].float().requires_grad_()) is None
    assert tried(mask=mask.expand(1, 6, TOKENS, TOKENS)) is None
    long = torch.zeros(1, 2, LONGEST + 1, 8)
    assert (
        attend_within(sdpa_attention_forward, nn.Module(), (long, long, long, None), [0, LONGEST + 1], (), {}) is None
    )


def test_lengths_are_those_of_variable_length_kernels() -> None:
    """FlashAttention's convention: sequences of 3, 7, 1 and 5 tokens are (0, 3, 10, 11, 16) in int32."""
    found = lengths_of(restarting(LENGTHS))
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == ENDS
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 7


def _flops(model: Any, by_document: bool, rows: list[dict[str, list[int]]]) -> int:
    with FlopCounterMode(display=False) as counter, splitting(lambda: None):
        score(model, OneRow()(rows), True, None, by_document).total.backward()
    return counter.get_total_flops()


def test_pairs_of_tokens_in_different_documents_are_not_computed() -> None:
    model = tiny.build("llama")
    adapters.attach(model, "lora")
    ids = torch.randint(5, 100, (4, 200), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": one, "labels": one} for one in ids]
    config = model.config
    width, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    other = tiny.build("llama")
    adapters.attach(other, "prefix", length=2)  # of another model: what acts nowhere here is no hindrance
    # q k^T and p v in forward; in backward the scores again and four products: 7 of 2 width flops a pair
    in_attention = _flops(model, True, rows) - _flops(model, False, rows)  # torch counts none of its own on CPUs
    pairs = 96 * 96 + 104 * 200  # 96 queries see as many keys, the other 104 all 200
    assert in_attention == layers * 7 * 2 * width * 4 * pairs


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_recomputed_finds_its_documents_again(reentrant: bool) -> None:
    losses, gradients, calls = [], [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny.build("llama")
        adapters.attach(model, "lora")
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in LENGTHS]
        seen: list[None] = []
        with splitting(lambda seen=seen: seen.append(None)):  # type: ignore[misc]
            found = score(model, OneRow()(rows), True, None, True)
            found.total.backward()
        losses.append(float(found.total))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(len(seen))
    assert calls[1] == 2 * calls[0] > 0
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)


def test_other_trainers_lengths_are_left_alone_and_the_interface_is_given_back() -> None:
    gc.collect()
    owners = _dispatch._owners["documents"]
    others = set(owners)  # trainers of other tests that somebody still holds
    model = tiny.build("llama")
    owner = nn.Module()
    positions = restarting(LENGTHS)
    ids = torch.arange(5, 5 + TOKENS)[None]
    seen: list[None] = []
    split_rows(owner)
    assert len(owners) == len(others) + 1
    with splitting(lambda: seen.append(None)):
        foreign = lengths_of(positions) | {"cu_seq_lens_q": torch.tensor(ENDS, dtype=torch.int32)}
        model(input_ids=ids, position_ids=positions, use_cache=False, **foreign)
        assert not seen
        model(input_ids=ids, position_ids=positions, use_cache=False, **lengths_of(positions))
        assert len(seen) == model.config.num_hidden_layers
    del owner
    gc.collect()
    assert owners <= others
    assert ("documents" in _dispatch._outermost) == bool(owners)
    assert (AttentionInterface.get_interface is _dispatch._get_interface) == bool(_dispatch._applied)


def test_an_owner_that_is_collected_while_code_is_compiled_leaves_later() -> None:
    """What a compiler has read must be there when it makes its guards of it."""
    from torch._guards import CompileContext, CompileId, compile_context

    model, owner = tiny.build("llama"), nn.Module()
    split_rows(owner)
    before, known = _dispatch._applied, set(_dispatch._owners["documents"])
    with compile_context(CompileContext(CompileId(frame_id=0, frame_compile_id=0))):
        del owner
        gc.collect()
        assert _dispatch._applied is before
        assert _dispatch._owners["documents"] == known
    model(input_ids=torch.arange(5, 12)[None], use_cache=False)
    assert _dispatch._owners["documents"] < known
    assert not _dispatch._late


def test_documents_are_split_outside_of_a_prefix() -> None:
    """Each document sees the prefix, whether the prefix was attached before or after rows are split."""
    model = tiny.build("llama")
    ids = torch.arange(5, 5 + TOKENS)[None]
    with splitting(lambda: None):
        adapters.attach(model, "prefix", length=4)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        positions = restarting(LENGTHS)
        shared = model(input_ids=ids, position_ids=positions, use_cache=False, **lengths_of(positions)).logits[0]
    alone = [model(input_ids=ids[:, a:b], use_cache=False).logits[0] for a, b in pairwise(ENDS)]
    torch.testing.assert_close(shared, torch.cat(alone), rtol=1e-5, atol=1e-5)
