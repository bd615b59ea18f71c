"""Weights in 4 bits that code reads: what stands for them against the dense weight: outputs, gradients, memory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import tiny
import torch
from laws import output, relative, shake, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import adapters
from adapters._attach import tensors_of
from adapters._fourbit import Packed, dequantize, gives_back, is_quantized, quantized_stacks
from adapters._quantize.stacks import pack

bnb = pytest.importorskip("bitsandbytes")


class Stack(nn.Module):
    """Reads a stack of matrices, as fused experts do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(4, 64, 128, generator=generator), requires_grad=False)


def packed() -> tuple[Any, Tensor]:
    """A module whose weight is in 4 bits, and the dense weight that it stands for."""
    module = Stack()
    pack(module, "w", None)
    return module, dequantize(module._parameters["w"])


PRODUCTS = {
    "linear of one": (lambda x, w: F.linear(x, w[2]), (5, 128)),
    "linear with bias": (lambda x, w: F.linear(x, w[1], torch.arange(64.0)), (2, 5, 128)),
    "matmul with all": (lambda x, w: torch.matmul(x, w.transpose(1, 2)), (4, 5, 128)),
    "bmm, untransposed": (lambda x, w: torch.bmm(x, w), (4, 5, 64)),
    "operator": (lambda x, w: x @ w[0].t(), (5, 128)),
    "weight on the left": (lambda x, w: w[3] @ x, (128, 5)),
    "formed": (lambda x, w: torch.einsum("be,ieo->bio", x, w), (5, 64)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_the_dense_weight(name: str) -> None:
    function, shape = PRODUCTS[name]
    module, dense = packed()
    assert isinstance(module.w, Packed)
    assert (module.w.shape, module.w.dtype, module.w.dim()) == (dense.shape, dense.dtype, 3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = function(ours, module.w), function(theirs, dense)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-5)


def test_what_is_not_given_back_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe against the definition itself, on whatever machine this is, and the report of what it refuses."""
    import bitsandbytes.functional as functional

    assert gives_back(128, torch.float32, torch.device("cpu"))
    real = functional.dequantize_4bit

    def wrong(packed: Tensor, quant_state: Any, **more: Any) -> Tensor:
        found: Tensor = real(packed, quant_state=quant_state, **more)
        return found if found.shape[-1] != 192 else found.flip(0)  # what AVX512 does to rows that end within a block

    monkeypatch.setattr(functional, "dequantize_4bit", wrong)
    gives_back.cache_clear()
    try:
        model = nn.Sequential(nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 64))
        report = adapters.quantize(model, "nf4")
        assert report.quantized == ("0",)
        assert "does not give back rows of 192 rightly" in report.left["2.weight"]
        assert type(model[2]) is nn.Linear
    finally:
        gives_back.cache_clear()


@pytest.mark.parametrize("width", [16, 48, 64, 96, 128, 160, 320])
def test_every_width_that_is_quantised_is_the_definition(width: int) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(width, 64)
    before = layer.weight.detach().clone()
    model = nn.Sequential(layer, nn.Linear(64, 64))
    adapters.quantize(model, "nf4")
    held = model[0].weight
    if is_quantized(held):
        rounding = (dequantize(held).float() - before).abs().max() / before.abs().max()
        assert 0.01 < rounding < 0.2
    else:
        assert torch.equal(held, before)


def test_one_matrix_of_a_stack_is_read_by_itself() -> None:
    module, dense = packed()
    for index in range(4):
        assert torch.equal(module.w[index].dense(), dense[index])
        assert torch.equal(module.w.mT[torch.tensor(index)].dense(), dense[index].T)


def test_autograd_keeps_the_packed_weight() -> None:
    """What is saved for the backward pass is far smaller than the dense weights."""
    module, dense = packed()
    kept = 0

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x

    x = torch.randn(4, 5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        torch.matmul(x, module.w.mT)
    assert kept < 0.1 * dense.numel() * dense.element_size()


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_experts_in_four_bits_train_as_their_dense_weights_do(experts: str) -> None:
    """Against the same model with the dequantised weights in place: outputs, and gradients of the adapter."""
    model, batch = tiny.build("qwen3_moe", torch.bfloat16), tiny.inputs("qwen3_moe")
    model.set_experts_implementation(experts)
    adapters.quantize(model)
    stacks = [path for path, _, _ in quantized_stacks(model)]
    assert len(stacks) == 4
    twin = copy.deepcopy(model)
    for path, module, name in list(quantized_stacks(twin)):
        module._parameters[name] = nn.Parameter(dequantize(module._parameters[name]), requires_grad=False)
        assert path in stacks
    gradients = []
    for each in (model, twin):
        torch.manual_seed(1)
        adapters.attach(each, "lora", name="a", rank=4, targets="*experts*")
        shake(each, "a")
        logits = each(**batch).logits
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        (logits * direction).float().sum().backward()
        gradients.append({key: p.grad for key, p in tensors_of(each, "a").items()})
    assert torch.equal(output(model, batch), output(twin, batch))
    for key, grad in gradients[1].items():
        assert relative(gradients[0][key], grad) < 1e-2, key


def test_the_classes_and_the_weights_come_back_with_a_merge() -> None:
    model, batch = tiny.build("qwen3_moe"), tiny.inputs("qwen3_moe")
    before = {path: type(module) for path, module in model.named_modules()}
    adapters.attach(model, "qlora", name="a", rank=4)
    shake(model, "a")
    adapted = output(model, batch)
    adapters.merge(model, "a", example=batch)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert not any(is_quantized(p) for p in model.parameters())
    assert relative(output(model, batch), adapted) < 2e-2


def test_a_merge_that_is_refused_leaves_the_experts_packed() -> None:
    model, batch = tiny.build("qwen3_moe"), tiny.inputs("qwen3_moe")
    adapters.attach(model, "qlora", name="a", rank=4)
    shake(model, "a")
    before, expected = snapshot(model)["types"], output(model, batch)
    with pytest.raises(adapters.AdapterError, match="more than the tolerance"):
        adapters.merge(model, "a", example=batch, tolerance=1e-12)
    assert snapshot(model)["types"] == before
    assert torch.equal(output(model, batch), expected)


def test_a_model_with_packed_experts_can_be_copied_and_pickled() -> None:
    model, batch = tiny.build("qwen3_moe"), tiny.inputs("qwen3_moe")
    adapters.quantize(model)
    expected = output(model, batch)
    assert torch.equal(output(copy.deepcopy(model), batch), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False), batch), expected)


def test_a_subclass_of_linear_that_multiplies_and_nothing_else_is_quantised_and_comes_back() -> None:
    import transformers as hf

    sizes = {"vocab_size": 160, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = hf.FalconForCausalLM(hf.FalconConfig(**sizes)).eval()
    before = {path: type(module) for path, module in model.named_modules()}
    assert before["transformer.h.0.mlp.dense_h_to_4h"] is not nn.Linear
    adapters.attach(model, "qlora", name="a", rank=4)
    shake(model, "a")
    assert is_quantized(model.transformer.h[0].mlp.dense_h_to_4h.weight)
    adapted = output(model, tiny.inputs(model))
    adapters.merge(model, "a")
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert relative(output(model, tiny.inputs(model)), adapted) < 2e-2
