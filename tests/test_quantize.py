"""4-bit bases: what is quantised, that the upstream repacking bug stays out, that merges keep what was learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import tiny
import torch
from laws import assert_same, output, relative, shake, snapshot
from torch import nn

import adapters
from adapters._attach import tensors_of
from adapters._fourbit import dequantize, elements, is_quantized, quantized_modules


def quantized(name: str = "llama", compute: torch.dtype = torch.bfloat16) -> Any:
    model = tiny.build(name, torch.bfloat16)
    adapters.quantize(model, "nf4", compute_dtype=compute)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_classifier", "qwen3_moe"])
def test_every_linear_layer_but_the_head_is_quantised_and_the_rest_reported(name: str) -> None:
    model = tiny.build(name, torch.bfloat16)
    layers = {path: module for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    original = {path: module.weight.detach().clone() for path, module in layers.items()}
    report = adapters.quantize(model, "nf4")
    heads = {path for path in layers if path.split(".")[0] in ("lm_head", "classifier") or "pooler" in path}
    assert set(report.quantized) == set(layers) - heads
    assert {path for path, _ in quantized_modules(model)} == set(report.quantized)
    assert heads <= {path.removesuffix(".weight") for path in report.left}
    stacks = {
        path: p for path, p in model.named_parameters() if path.rpartition(".")[2] in ("gate_up_proj", "down_proj")
    }
    assert set(report.stacks) == set(stacks)
    assert all(is_quantized(p) for p in stacks.values())
    for path in report.quantized:
        module = model.get_submodule(path)
        stored = original[path].mT if type(layers[path]).__name__ == "Conv1D" else original[path]
        assert module.weight.quant_state.quant_type == "nf4"
        assert module.weight.quant_state.nested  # double quantisation
        packed, state = bnb.functional.quantize_4bit(stored.contiguous(), quant_type="nf4", compress_statistics=True)
        assert torch.equal(dequantize(module.weight), bnb.functional.dequantize_4bit(packed, state))
    held = sum(original[path].numel() for path in report.quantized) + sum(map(elements, stacks.values()))
    assert report.weights == held
    assert report.fraction == 2 * held / report.bytes_before
    assert report.bytes_after < 0.6 * report.bytes_before


def test_quantising_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(adapters.AdapterError, match="nothing in this model can be quantised"):
        adapters.quantize(nn.Sequential(nn.Embedding(8, 64), nn.Linear(5, 3)))
    with pytest.raises(adapters.AdapterError, match="did you mean 'nf4'"):
        adapters.quantize(tiny.build("llama"), "nf5")
    model = tiny.build("llama")
    adapters.attach(model, "lora")
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match="detach"):
        adapters.quantize(model)
    assert_same(snapshot(model), before)


def test_a_subclass_with_its_own_forward_is_not_quantised() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    report = adapters.quantize(nn.Sequential(Doubled(64, 64), nn.Linear(64, 64)))
    assert report.quantized == ("1",)
    assert list(report.left) == ["0.weight"]


def test_the_upstream_bug_exists_and_a_repacked_base_is_refused() -> None:
    """If this fails because nothing is repacked, the CPU has no AVX512-BF16 or upstream has mended the bug."""
    model = quantized()
    layer = model.model.layers[0].mlp.down_proj
    before = dequantize(layer.weight)
    layer.support_avx512bf16_for_cpu = True
    if not bnb.nn.modules.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, where alone the bug shows")
    output(model, tiny.inputs("llama"))
    with pytest.raises(adapters.AdapterError, match="repacked"):
        adapters.attach(model, "lora")
    naive = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert naive.shape != before.shape or relative(naive, before) > 0.1


def trained(model: Any, evaluate_first: bool) -> dict[str, torch.Tensor]:
    """One step of plain SGD on a fixed loss; optionally after a forward in eval mode."""
    torch.manual_seed(0)
    adapters.attach(model, "qlora", name="fr", rank=4)
    shake(model, "fr")
    batch = tiny.inputs("llama")
    if evaluate_first:
        model.eval()
        output(model, batch)
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {key: tensor.grad.clone() for key, tensor in tensors_of(model, "fr").items()}


def test_an_eval_forward_changes_nothing_afterwards(tmp_path: Path) -> None:
    plain, evaluated = quantized(), quantized()
    output(evaluated, tiny.inputs("llama"))  # before attaching, too
    expected, found = trained(plain, False), trained(evaluated, True)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    for (path, a), (_, b) in zip(quantized_modules(plain), quantized_modules(evaluated), strict=True):
        assert torch.equal(dequantize(a.weight), dequantize(b.weight)), path
    first, second = plain.state_dict(), evaluated.state_dict()
    assert all(torch.equal(second[key], value) for key, value in first.items())
    adapters.save(plain, "fr", tmp_path / "a")
    adapters.save(evaluated, "fr", tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    adapters.merge(plain, "fr")
    adapters.merge(evaluated, "fr")
    assert all(torch.equal(evaluated.state_dict()[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_classifier"])
def test_merged_is_a_plain_model_and_within_two_percent_in_bf16(name: str) -> None:
    model, batch = quantized(name), tiny.inputs(name)
    adapters.attach(model, "qlora", name="fr", rank=4, targets="all")
    shake(model, "fr")
    adapted = output(model, batch)
    certificate = adapters.merge(model, "fr", example=batch)
    assert "dequantised from nf4 to bfloat16" in certificate.path
    assert relative(output(model, batch), adapted) < 2e-2
    assert not any(True for _ in quantized_modules(model))
    classes = {type(module).__name__ for module in model.modules()}
    assert classes == {type(module).__name__ for module in tiny.build(name).modules()}
    plain = tiny.build(name, torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(plain, batch), output(model, batch))


def test_merging_back_into_four_bits_has_to_be_asked_for_and_says_what_is_lost() -> None:
    model = quantized()
    adapters.attach(model, "lora", name="fr", rank=4)
    shake(model, "fr")
    twin = copy.deepcopy(model)
    kept = adapters.merge(model, "fr")
    lossy = adapters.merge(twin, "fr", requantize="nf4")
    assert any(True for _ in quantized_modules(twin))
    assert lossy.error > 5 * kept.error
    assert any("nf4" in note for note in lossy.notes)


def test_a_merge_beyond_the_tolerance_leaves_the_model_as_it_was() -> None:
    model, batch = quantized(), tiny.inputs("llama")
    adapters.attach(model, "lora", name="fr", rank=4)
    shake(model, "fr")
    before, adapted = snapshot(model), output(model, batch)
    with pytest.raises(adapters.AdapterError, match="tolerance"):
        adapters.merge(model, "fr", tolerance=1e-12)
    assert_same(snapshot(model), before)
    assert torch.equal(output(model, batch), adapted)


def test_a_report_counts_weights_not_bytes() -> None:
    count = sum(p.numel() for p in tiny.build("llama").parameters())
    assert adapters.attach(tiny.build("llama"), "lora").base_parameters == count
    assert adapters.attach(quantized(), "qlora").base_parameters == count


def test_an_adapter_of_a_quantised_conv1d_loads_where_it_is_dense(tmp_path: Path) -> None:
    """GPT-2 stores (n_in, n_out), a layer in its place in 4 bits (n_out, n_in)."""
    dense, four, batch = tiny.build("gpt2", torch.bfloat16), quantized("gpt2"), tiny.inputs("gpt2")
    adapters.attach(four, "lora", name="a", rank=4)
    shake(four, "a")
    adapters.save(four, "a", tmp_path / "a")
    adapters.load(dense, tmp_path / "a", name="b")
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for at in ("c_attn", "c_proj"):
        added = []
        for model, name in ((four, "a"), (dense, "b")):
            layer = getattr(model.transformer.h[0].attn, at)
            with torch.no_grad(), adapters.using(model, name):
                adapted = layer(x)
            with torch.no_grad(), adapters.using(model, None):
                added.append(adapted - layer(x))
        assert relative(added[1], added[0]) < 2e-2
    assert relative(output(dense, batch), output(four, batch)) < 0.2
    adapters.merge(dense, "b", example=batch)
