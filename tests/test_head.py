"""The loss through the model's own head, some positions at a time, against the logits of every token."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

import adapters
from adapters.train import head
from adapters.train.batches import OneRow, PaddedRows
from adapters.train.loss import score, takes_pieces
from tests.matrix.build import build
from tests.matrix.pairs import pairs

PAIRS = {pair.type: pair for pair in pairs() if pair.head == "causal"}

ROWS = [
    {"input_ids": [11, 23, 7, 31, 19, 8, 40], "labels": [-100, -100, 7, 31, -100, 8, 40]},
    {"input_ids": [52, 9, 33], "labels": [52, 9, 33]},
    {"input_ids": [17, 60, 21, 44, 6], "labels": [-100, -100, -100, 44, 6]},
]
COUNT = 8
# what stands between the hidden states and the logits: nothing, a soft cap, factors, a bias, experts, a tied head
TYPES = ["llama", "gemma2", "cohere", "granite", "phi", "gptj", "qwen3_moe", "gpt2", "olmo2", "mamba", "bamba"]
METHODS = ["lora", "prefix", "bottleneck"]


def shaken(kind: str, method: str = "lora", **options: Any) -> Any:
    torch.manual_seed(0)
    model, _ = build(PAIRS[kind])
    adapters.attach(model, method, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def definition(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float, int]:
    """Loss, entropy and right tokens over full logits; nothing of `adapters.train` is used."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    wanted = batch["labels"][:, 1:].flatten()
    learned = wanted != -100
    chances = torch.softmax(logits[learned], -1)
    entropy = float(torch.special.entr(chances).sum())
    right = int((logits[learned].argmax(-1) == wanted[learned]).sum())
    return F.cross_entropy(logits, wanted, reduction="sum"), entropy, right


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def compare(model: Any, batch: dict[str, torch.Tensor]) -> None:
    expected, entropy, right = definition(model, batch)
    theirs = gradients(model, expected)
    found = score(model, batch, True, in_pieces=True)
    ours = gradients(model, found.total)
    assert int(found.count) == COUNT
    assert int(found.correct) == right
    assert float(found.entropy) == pytest.approx(entropy, rel=1e-5)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys() != set()
    for name, gradient in ours.items():
        size = float(theirs[name].abs().max())
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6 + 1e-5 * size, msg=name)


@pytest.mark.parametrize("kind", TYPES)
def test_pieces_give_the_loss_and_the_gradients_of_all_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(kind)
    monkeypatch.setattr(head, "LOGITS", 3 * model.config.get_text_config().vocab_size)  # three positions at a time
    assert takes_pieces(model)
    for collator in (PaddedRows(0), OneRow()):
        batch = collator(ROWS)
        if kind in ("mamba", "bamba"):
            batch.pop("position_ids", None)
        compare(model, batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_method_learns_through_pieces(method: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken("llama", method)
    monkeypatch.setattr(head, "LOGITS", 3 * model.config.vocab_size)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    compare(model, PaddedRows(0)(ROWS))


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    """By an adapter of its own, or because its tokens are: both lie above the hidden states."""
    model = shaken("llama", "lora", targets=["lm_head", "q_proj"])
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    compare(model, PaddedRows(0)(ROWS))
    model, _ = build(PAIRS["llama"])
    for p in model.parameters():
        p.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    compare(model, PaddedRows(0)(ROWS))


def test_another_way_from_the_layers_to_the_logits_keeps_its_gradient() -> None:
    model = shaken("llama")
    forward = type(model).forward

    class Mixing(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs, output_hidden_states=True)
            out.logits = out.logits * (1 + out.hidden_states[-2].mean())
            return out

    model.__class__ = Mixing
    compare(model, PaddedRows(0)(ROWS))


def test_words_without_a_chance_and_rows_without_labels() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = -torch.inf
    labels = torch.tensor([1, 0, 8, 3])
    total, correct, entropy, slope = head._chunk(logits, labels, True)
    wanted = logits.clone().requires_grad_()
    expected = F.cross_entropy(wanted, labels, reduction="sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, wanted)[0])
    torch.testing.assert_close(entropy, torch.special.entr(torch.softmax(logits, -1)).sum())
    assert int(correct) == int((logits.argmax(-1) == labels).sum())

    model = shaken("llama")
    batch = PaddedRows(0)([{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}])
    found = score(model, batch, True, in_pieces=True)
    assert (float(found.total.detach()), int(found.count)) == (0.0, 0)
    found.total.backward()  # under several processes, every one must take part


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_no_logits_are_kept_for_backward() -> None:
    model = tiny.build("llama")
    adapters.attach(model, "lora")
    words, width = model.config.vocab_size, model.config.hidden_size
    assert words != width
    batch = PaddedRows(0)(ROWS)
    sizes = {}
    for in_pieces in (False, True):
        kept: list[weakref.ref[_Kept]] = []

        def pack(x: torch.Tensor, kept: list[Any] = kept) -> _Kept:
            holder = _Kept(x)
            kept.append(weakref.ref(holder))
            return holder

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            found = score(model, batch, True, in_pieces=in_pieces)
        shapes = [tuple(holder.tensor.shape) for each in kept if (holder := each()) is not None]
        sizes[in_pieces] = [shape for shape in shapes if words in shape and width not in shape]
        assert found.total.requires_grad
    assert sizes[False]
    assert sizes[True] == []


def test_a_model_whose_layers_must_run_is_left_as_it_is() -> None:
    model = shaken("llama")
    forward = type(model).forward

    class Demanding(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.model, head._Answer):
                raise RuntimeError("the layers were not run")
            return forward(self, *args, **kwargs)

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            if isinstance(self.model, head._Answer):
                out.logits = 2 * out.logits
            return out

    assert takes_pieces(model)
    for cls in (Demanding, Other):
        model.__class__ = cls
        assert not takes_pieces(model), cls
    assert not isinstance(model.model, head._Answer)
