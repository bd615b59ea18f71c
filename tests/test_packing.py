"""Documents that share a row: the probe tells where they stay apart, and there loss and gradients are those of each."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

import adapters
from adapters.train import Packing, probe_packing
from adapters.train.batches import CheaperRows, OneRow, PaddedRows
from adapters.train.documents import splitting
from adapters.train.loss import score, takes_columns
from adapters.train.packing import block_mask, mask_dtype, restarting
from tests.matrix.build import build
from tests.matrix.pairs import pairs

# by hand: decoders whose masks follow the positions, one whose mask must be given, and those with a state or without
# position ids
KINDS = {
    "llama": "packed",
    "qwen3": "packed",
    "gemma2": "packed",
    "gpt2": "packed",
    "gpt_neox": "packed",
    "phi3": "packed",
    "mistral": "packed",
    "qwen3_moe": "packed",
    "opt": "masked",
    "bloom": "padded",
    "mamba": "padded",
    "jamba": "padded",
    "bamba": "padded",
}
PAIRS = {pair.type: pair for pair in pairs() if pair.head == "causal"}
METHODS = {"lora": {"rank": 3}, "bottleneck": {"reduction_factor": 8}, "prefix": {"length": 4}}
DOCUMENTS = [
    {"input_ids": [11, 23, 7, 31, 19, 8, 40], "labels": [-100, -100, 7, 31, -100, 8, 40]},
    {"input_ids": [52, 9, 33], "labels": [52, 9, 33]},  # its first token is no target, whatever lies before it
    {"input_ids": [17, 60, 21, 44, 6], "labels": [-100, -100, -100, 44, 6]},
]
COUNT = 4 + 2 + 2


def alone(model: Any) -> torch.Tensor:
    """The loss of each document in a forward of its own, over full logits; nothing of `adapters.train` is used."""
    total = torch.zeros(())
    for row in DOCUMENTS:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits.float(), torch.tensor(row["labels"][1:]), reduction="sum")
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


BY_DOCUMENT = {"llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3", "mistral", "qwen3_moe", "opt"}


@pytest.mark.parametrize("kind_of", KINDS, ids=str)
def test_sharing_a_row_changes_neither_loss_nor_gradients(kind_of: str) -> None:
    for method, hyperparameters in METHODS.items():
        model, _ = build(PAIRS[kind_of])
        adapters.attach(model, method, **hyperparameters)
        shake(model)
        found = probe_packing(model)
        assert found.kind == KINDS[kind_of], (method, str(found))
        shared = PaddedRows(0)(DOCUMENTS) if found.kind == "padded" else OneRow()(DOCUMENTS)
        assert shared["input_ids"].shape == ((3, 7) if found.kind == "padded" else (1, 15))
        assert found.by_document == (kind_of in BY_DOCUMENT), (method, str(found))
        mask = mask_dtype(model) if found.kind == "masked" else None
        expected = alone(model)
        theirs = gradients(model, expected)
        for by_document in {False, found.by_document}:
            with splitting(lambda: None):
                scored = score(model, shared, takes_columns(model), mask, by_document)
                ours = gradients(model, scored.total)
            assert int(scored.count) == COUNT
            torch.testing.assert_close(scored.total, expected, rtol=1e-5, atol=1e-5)
            assert ours.keys() == theirs.keys()
            assert len(ours) > 0
            for name, gradient in ours.items():
                assert gradient.abs().max() > 0, name
                torch.testing.assert_close(
                    gradient, theirs[name], rtol=1e-4, atol=1e-5 + 1e-5 * float(theirs[name].abs().max())
                )


def test_where_the_probe_says_no_a_shared_row_is_another_loss() -> None:
    """The refusals are not idle: the packed row of a hybrid model does differ."""
    model, _ = build(PAIRS["bamba"])
    packed = score(model, OneRow()(DOCUMENTS), True).total
    assert abs(float((packed - alone(model)).detach())) > 1e-2


def test_a_window_is_kept_and_one_that_a_mask_would_lose_is_refused() -> None:
    model = tiny.build("gemma2")
    assert probe_packing(model).kind == "packed"
    model.config.sliding_window = 4
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4 if layer.self_attn.sliding_window else None
    rows = [{"input_ids": list(range(10 + i, 30 + 2 * i)), "labels": list(range(10 + i, 30 + 2 * i))} for i in range(3)]
    found = probe_packing(model)
    assert found.kind == "packed"
    separate = sum(score(model, PaddedRows(0)([row]), True).total for row in rows)
    torch.testing.assert_close(score(model, OneRow()(rows), True).total, separate)
    masked, _ = build(PAIRS["opt"])
    masked.config.sliding_window = 4096
    assert "window of 4096 tokens would be lost" in probe_packing(masked).reason


def test_a_model_that_tells_nothing_is_not_taken_at_its_word() -> None:
    model = tiny.build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # a token's logits now depend on that token alone
    found = probe_packing(model)
    assert found.kind == "padded"
    assert "depend too little on earlier tokens" in found.reason


def test_a_small_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    embed = model.model.embed_tokens

    def leaking(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * F.pad(output, (0, 0, 1, 0))[:, :-1]  # of the token before, across documents as well

    assert probe_packing(model).kind == "packed"
    handle = embed.register_forward_hook(leaking)
    found = probe_packing(model)
    handle.remove()
    assert found.kind == "padded"
    assert found.difference is not None
    assert found.effect is not None
    assert 1e-5 < found.difference < 0.1 < found.effect


def test_a_model_that_fails_is_padded_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    forward = type(model.model).forward

    def picky(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            raise RuntimeError("no positions\n  please")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", picky)
    found = probe_packing(model)
    assert found.kind == "padded"
    assert found.reason.startswith("the model fails: RuntimeError: no positions please")
    assert str(found) == f"padded: {found.reason}"


def test_modes_random_state_and_gradients_are_left_alone() -> None:
    model = tiny.build("gpt2")
    adapters.attach(model, "lora", rank=2)
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state(), random.getstate()
    assert probe_packing(model).kind == "packed"
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_judged_by_its_own_rounding(dtype: torch.dtype) -> None:
    for name in ("llama", "qwen3_moe"):
        model = tiny.build(name, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            assert probe_packing(model).kind == "packed"
    masked, _ = build(PAIRS["opt"])
    with torch.autocast("cpu", torch.bfloat16):
        assert probe_packing(masked).kind == "masked"


def test_a_4_bit_base_with_qlora() -> None:
    model = tiny.build("llama", torch.bfloat16)
    adapters.attach(model, "qlora", rank=2)
    assert probe_packing(model).kind == "packed"


def test_the_mask_is_causal_within_each_document() -> None:
    positions = restarting([2, 1, 3])
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    seen = block_mask(positions, torch.float16)
    assert seen.dtype == torch.float16
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for start, end in ((0, 2), (2, 3), (3, 6)):
        for query in range(start, end):
            expected[query, start : query + 1] = True
    assert torch.equal(seen[0, 0] == 0, expected)
    assert (seen[0, 0][~expected] == torch.finfo(torch.float16).min).all()


def test_batches_hold_the_same_tokens_and_labels() -> None:
    padded, one = PaddedRows(pad=2, multiple=4)(DOCUMENTS), OneRow()(DOCUMENTS)
    assert padded["input_ids"].shape == (3, 8)
    assert padded["input_ids"][1].tolist() == [52, 9, 33, 2, 2, 2, 2, 2]
    assert padded["attention_mask"].sum(1).tolist() == [7, 3, 5]
    assert padded["labels"][1].tolist() == [-100, 9, 33, -100, -100, -100, -100, -100]
    assert set(one) == {"input_ids", "position_ids", "labels"}
    assert one["input_ids"][0].tolist() == [token for row in DOCUMENTS for token in row["input_ids"]]
    assert one["position_ids"][0].tolist() == [*range(7), *range(3), *range(5)]
    assert one["labels"][0, 7:10].tolist() == [-100, 9, 33]
    assert (one["labels"] != -100).sum() == (padded["labels"] != -100).sum() == COUNT


def test_rows_that_hold_several_documents_are_taken_apart() -> None:
    ids = [token for row in DOCUMENTS[:2] for token in row["input_ids"]]
    labels = [label for row in DOCUMENTS[:2] for label in row["labels"]]
    rows = [{"input_ids": ids, "labels": labels, "seq_lengths": [7, 3]}, DOCUMENTS[2]]
    for collator in (PaddedRows(0), OneRow()):
        taken, expected = collator(rows), collator(DOCUMENTS)
        assert all(torch.equal(taken[key], expected[key]) for key in expected)


def test_a_row_is_shared_where_that_is_less_work() -> None:
    cheaper = CheaperRows(PaddedRows(0), width=64)
    even = [{"input_ids": [7] * 600, "labels": [7] * 600}] * 3
    uneven = [{"input_ids": [7] * length, "labels": [7] * length} for length in (600, 20, 10)]
    assert cheaper(even)["input_ids"].shape == (3, 600)  # nothing to save, and 9 times the pairs
    assert cheaper(uneven)["input_ids"].shape == (1, 630)


def test_whether_positions_can_be_asked_for_is_tried() -> None:
    model = tiny.build("llama")
    assert takes_columns(model)
    forward = type(model).forward

    class Counting(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
            return forward(self, *args, logits_to_keep=int(logits_to_keep), **kwargs)

    class Ignoring(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

    class Without(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
            return forward(self, input_ids=input_ids, attention_mask=attention_mask)

    expected = float(score(model, PaddedRows(0)(DOCUMENTS), True).total)
    for cls in (Counting, Ignoring, Without):
        model.__class__ = cls
        assert not takes_columns(model), cls
        assert float(score(model, PaddedRows(0)(DOCUMENTS), False).total) == pytest.approx(expected, rel=1e-6)


def test_a_packing_is_a_record() -> None:
    assert Packing("packed", "seen", 1e-7, 0.5) == Packing("packed", "seen", 1e-7, 0.5)
