"""Batches computed on their real tokens alone, against the same batches with their padding."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from laws import shake
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

import adapters
from adapters import _dispatch
from adapters.train import unpad
from adapters.train.real_tokens import KEY, RealTokens
from tests.matrix.build import build
from tests.matrix.pairs import pairs

KINDS = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "bert")
METHODS = {"lora": {"rank": 3}, "bottleneck": {"reduction_factor": 8}, "prefix": {"length": 4}, "dora": {"rank": 2}}
LENGTHS = torch.tensor([5, 11, 2, 8])
TOKENS = 11
PAIRS = {(pair.type, pair.head): pair for pair in pairs()}


def ragged(left: bool = False, pad: int = 0, words: int = tiny.VOCAB) -> dict[str, Tensor]:
    real = torch.arange(TOKENS) < LENGTHS[:, None]
    real = real.flip(1) if left else real
    ids = torch.randint(5, words, real.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": torch.where(real, ids, pad), "attention_mask": real.long()}


@contextmanager
def tokens_seen(model: nn.Module) -> Iterator[set[int]]:
    """How many tokens each linear layer between embeddings and head is given."""
    seen: set[int] = set()
    places = [m for name, m in model.named_modules() if name.endswith(("mlp", "intermediate.dense"))]
    handles = [
        m.register_forward_pre_hook(lambda m, args: seen.add(args[0].numel() // args[0].shape[-1])) for m in places
    ]
    yield seen
    for handle in handles:
        handle.remove()


def step(model: Any, batch: dict[str, Tensor], **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over real tokens, and its gradients."""
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels, **more).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0)
    assert one[1].keys() == other[1].keys() != set()
    for name, gradient in other[1].items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(
            one[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_with_padding(kind: str, method: str) -> None:
    model: Any = tiny.build(kind).train()
    adapters.attach(model, method, **METHODS[method])
    shake(model, "default")
    batch = ragged()
    with tokens_seen(model) as before:
        expected = step(model, batch)
    found = unpad(model)
    assert found.spared, found
    with tokens_seen(model) as after:
        ours = step(model, batch)
    same(ours, expected)
    assert (before, after) == ({4 * TOKENS}, {int(LENGTHS.sum())})
    found.undo()
    with tokens_seen(model) as again:
        step(model, batch)
    assert again == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_see_real_tokens_alone(reentrant: bool) -> None:
    model: Any = tiny.build("llama").train()
    adapters.attach(model, "lora", rank=3)
    shake(model, "default")
    batch = ragged()
    expected = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert unpad(model).spared
    with tokens_seen(model) as seen:
        same(step(model, batch), expected)
    assert seen == {int(LENGTHS.sum())}


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "distilbert", "electra", "llama", "qwen2"])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_classifiers_say_the_same(kind: str, head: str) -> None:
    model, _ = build(PAIRS[kind, head])
    adapters.attach(model, "lora", rank=3)
    shake(model, "default")
    pad = int(model.config.pad_token_id or 0)
    batch = ragged(pad=pad, words=int(model.config.vocab_size))
    uncached = {"use_cache": False} if kind in ("llama", "qwen2") else {}
    with torch.no_grad():
        expected = model(**batch, **uncached).logits
        assert unpad(model).spared
        with tokens_seen(model) as seen:
            ours = model(**batch, **uncached).logits
    assert seen <= {int(LENGTHS.sum())}
    if head == "token":
        ours, expected = (x[batch["attention_mask"].bool()] for x in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["causal", "masked", "sequence", "token"])
def test_types_of_the_matrix_say_the_same(head: str) -> None:
    """Every 6th type of transformers, or every MATRIX_EVERYth: where it is said to hold, it holds on other rows too."""
    chosen = [pair for pair in pairs() if pair.head == head][:: int(os.environ.get("MATRIX_EVERY", "6"))]
    spared = 0
    for pair in chosen:
        try:
            model, batch = build(pair)
            found = unpad(model)
        except Exception:  # types that cannot be made or run here; how many remain is asserted below
            continue
        ids = batch.get("input_ids")
        if not found.spared or ids is None or ids.dim() != 2 or len(ids) < 2:
            continue
        spared += 1
        rows, tokens = ids.shape
        lengths = torch.tensor([max(2, tokens * (row + 1) // rows) for row in range(rows)])
        real = torch.arange(tokens) < lengths[:, None]
        pad = int(getattr(model.config, "pad_token_id", None) or 0)
        given = {key: x for key, x in batch.items() if key != "labels"}
        given |= {"input_ids": torch.where(real, ids, pad), "attention_mask": real.long()}
        given |= {"use_cache": False} if getattr(model.config, "use_cache", False) and head == "causal" else {}
        ours = outputs_and_gradients(model, given, real)
        assert found.spared
        found.undo()
        theirs = outputs_and_gradients(model, given, real)
        assert ours.keys() == theirs.keys()
        off = sum(float((ours[key] - theirs[key]).norm() ** 2) for key in theirs) ** 0.5
        assert off <= 1e-4 * sum(float(x.norm() ** 2) for x in theirs.values()) ** 0.5, pair
    assert spared >= len(chosen) / 3


def outputs_and_gradients(model: Any, given: dict[str, Any], real: Tensor) -> dict[str, Tensor]:
    """Of the first output at real tokens, weighed at random."""
    model.zero_grad()
    out = model(**given)[0]
    out = out[real] if out.dim() > 2 and out.shape[:2] == real.shape else out
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "output": out.detach()}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_before_a_token_is_computed_since_it_may_be_read(kind: str) -> None:
    """With padding on the left, a language model's first token is predicted at padding, and a pooler reads there."""
    model: Any = tiny.build(kind).train()
    adapters.attach(model, "lora", rank=3)
    shake(model, "default")
    gap = ragged()
    gap["attention_mask"][1, 4] = 0
    for batch in (ragged(left=True), gap):
        expected = step(model, batch)
        found = unpad(model)
        with tokens_seen(model) as seen:
            same(step(model, batch), expected)
        assert seen == {4 * TOKENS}
        found.undo()


# by hand: a scan over the tokens, biases by position in the model's own attention, answers over all places
@pytest.mark.parametrize(
    ("kind", "head", "sentence"),
    [
        ("mamba2", "causal", "its layers fail on real tokens alone"),
        ("bloom", "causal", "do not reach its layers"),
        ("recurrent_gemma", "causal", "outputs differ by"),
        ("bert", "question", "outputs differ by"),
        ("xlnet", "causal", "its layers take the tokens before the rows"),
    ],
)
def test_models_that_it_does_not_hold_for_go_on_as_they_were(kind: str, head: str, sentence: str) -> None:
    model, batch = build(PAIRS[kind, head])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    inputs["attention_mask"][1:, -3:] = 0
    hooks = [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()]
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = unpad(model)
        assert not found.spared
        assert sentence in str(found)
        assert torch.equal(model(**inputs)[0], expected)
    assert [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()] == hooks


def test_a_model_without_token_ids_is_refused() -> None:
    with pytest.raises(adapters.AdapterError, match="takes no rows of token ids"):
        unpad(build(PAIRS["bert", "choice"])[0])


def test_who_looks_at_layers_or_a_cache_sees_the_whole_batch() -> None:
    model: Any = tiny.build("llama")
    batch = ragged()
    with torch.no_grad():
        expected = [
            model(**batch, output_hidden_states=True),
            model(**batch),
            model.generate(**batch, max_new_tokens=3),
        ]
        assert unpad(model).spared
        states = model(**batch, output_hidden_states=True).hidden_states
        for ours, theirs in zip(states, expected[0].hidden_states, strict=True):
            assert torch.equal(ours, theirs)
        cached = model(**batch)
        assert torch.equal(cached.logits, expected[1].logits)
        assert cached.past_key_values.get_seq_length() == TOKENS
        assert torch.equal(model.generate(**batch, max_new_tokens=3), expected[2])
        model.train()
        assert model(**batch).past_key_values is None
        asked = model(**batch, use_cache=True)
        assert asked.past_key_values.get_seq_length() == TOKENS


def test_adapters_by_row_see_the_whole_batch() -> None:
    model: Any = tiny.build("llama")
    for seed, name in enumerate(("a", "b")):
        adapters.attach(model, "lora", name=name, rank=3)
        shake(model, name, seed=seed)
    batch = ragged()
    adapters.activate(model, "a")
    assert unpad(model).spared
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        adapters.activate(model, ["b", "a", None, "b"])
        with tokens_seen(model) as seen:
            mixed = model(**batch, use_cache=False).logits
        assert seen == {4 * TOKENS}
        for row, name in enumerate(("b", "a", None, "b")):
            adapters.activate(model, name)
            with tokens_seen(model) as seen:
                alone = model(**batch, use_cache=False).logits
            assert seen == {int(LENGTHS.sum())}
            torch.testing.assert_close(mixed[row][real[row]], alone[row][real[row]], rtol=1e-5, atol=1e-6)


def test_a_batch_without_padding_and_one_of_padding_alone_are_left_alone() -> None:
    model: Any = tiny.build("llama")
    batch = ragged()
    assert unpad(model).spared
    for value in (0, 1):
        mask = torch.full_like(batch["attention_mask"], value)
        with tokens_seen(model) as seen, torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        assert seen == {4 * TOKENS}


def test_copies_and_pickles_compute_real_tokens_alone_and_the_interface_is_given_back() -> None:
    gc.collect()
    owners = _dispatch._owners[KEY]
    others = set(owners)
    model: Any = tiny.build("bert")
    batch = ragged()
    with torch.no_grad():
        expected = model(**batch).logits[batch["attention_mask"].bool()]
    assert unpad(model).spared
    again = unpad(model)
    made = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    del model, again
    gc.collect()
    assert owners <= others
    for each in made:
        with tokens_seen(each) as seen, torch.no_grad():
            ours = each(**batch).logits[batch["attention_mask"].bool()]
        assert seen == {int(LENGTHS.sum())}
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    del made, each
    gc.collect()
    assert owners <= others
    assert (AttentionInterface.get_interface is _dispatch._get_interface) == bool(_dispatch._applied)


def test_gathering_and_spreading_are_adjoint() -> None:
    real = ragged()["attention_mask"]
    tokens = RealTokens(4, TOKENS, real.flatten().nonzero().squeeze(1))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, TOKENS, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(1, int(LENGTHS.sum()), 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.equal(tokens.gathered(x)[0], x[real.bool()])
    assert torch.equal(tokens.spread(y)[real.bool()], y[0])
    assert not tokens.spread(y)[~real.bool()].any()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(tokens.gathered, x)
        assert check(tokens.spread, y)


def test_trainers_of_transformers_learn_the_same(tmp_path: Any) -> None:
    """A script of one's own: two runs with the same rows, one of them on real tokens alone."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids[mask.bool()].tolist()} for ids, mask in zip(*ragged().values(), strict=True)] * 3
    trained = []
    for spare in (False, True):
        model: Any = tiny.build("llama")
        torch.manual_seed(0)
        adapters.attach(model, "lora", rank=3)
        shake(model, "default")
        if spare:
            assert unpad(model).spared
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
        )
        trainer = Trainer(model, arguments, data_collator=padded, train_dataset=Dataset.from_list(rows))
        with tokens_seen(model) as seen:
            trainer.train()
        assert (max(seen) < 4 * TOKENS) == spare
        trained.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-3, atol=1e-5)


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    labels = pad_sequence(ids, batch_first=True, padding_value=-100)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": labels}


def test_attention_of_others_is_not_touched() -> None:
    """Without the argument, the wrapper hands on what it was given, by position or by name."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, generator=generator) for _ in range(3))
    from adapters.train.real_tokens import _wrapper

    wrapped = _wrapper(sdpa_attention_forward, "sdpa")
    expected, _ = sdpa_attention_forward(nn.Module(), q, k, v, None, is_causal=False)
    for found in (
        wrapped(nn.Module(), q, k, v, None, is_causal=False),
        wrapped(nn.Module(), query=q, key=k, value=v, attention_mask=None, is_causal=False),
    ):
        assert torch.equal(found[0], expected)
