"""LoRA with patterns and biases, DoRA and IA3: stock PEFT with the same tensors, and what each refuses or reports."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import tiny
import torch
from laws import output, relative, shake
from torch import nn

import adapters
from adapters._attach import tensors_of

CLOSE = 1e-5  # relative, fp32
MODELS = ["llama", "phi3", "gpt2", "bert", "qwen3"]
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "lora",
        {"rank": 4, "alpha": 6.0, "rank_pattern": {"mlp.*": 2, "*.1.*": 7}, "alpha_pattern": {"attention.output": 9.0}},
    ),
    "rslora patterns": ("lora", {"rank": 4, "rslora": True, "rank_pattern": {"mlp.down": 9}}),
    "bias": ("lora", {"rank": 4, "alpha": 6.0, "bias": True}),
    "dora": ("dora", {"rank": 4, "alpha": 6.0, "rank_pattern": {"mlp.*": 2}}),
    "rsdora": ("dora", {"rank": 4, "alpha": 3.0, "rslora": True}),
    "ia3": ("ia3", {}),
    "ia3 elsewhere": ("ia3", {"targets": ["attention.*", "mlp.*"], "feedforward": ("attention.output",)}),
}
# PEFT's name of each of our tensors, below the module that it wraps
THEIRS = {
    "a": "lora_A.default.weight",
    "b": "lora_B.default.weight",
    "bias": "lora_B.default.bias",
    "magnitude": "lora_magnitude_vector.default.weight",
    "input": "ia3_l.default",
    "output": "ia3_l.default",
}


def attached(name: str, label: str, model: nn.Module | None = None, **more: Any) -> Any:
    model = tiny.build(name) if model is None else model
    method, options = FAMILY[label]
    adapters.attach(model, method, name="fr", **{**options, **more})
    shake(model, "fr", noise=0.3 if method == "ia3" else 0.08)
    return model


def by_peft(model: Any, base: Any) -> Any:
    """PEFT's own layers around `base`, with the tensors that `model` has."""
    adapter, ours = adapters.adapters_of(model)["fr"], tensors_of(model, "fr")
    owners = {site.path: site.owner for site in adapter.sites}
    theirs = peft.get_peft_model(base, configuration(adapter, ours))
    with torch.no_grad():
        for key, tensor in ours.items():
            their_tensor(theirs, owners, key).copy_(tensor)
    return theirs.train(model.training)


def their_tensor(theirs: Any, owners: dict[str, str], key: str) -> Any:
    path, _, name = key.rpartition(":")
    return theirs.get_parameter(f"base_model.model.{owners[path]}.{THEIRS[name]}")


def configuration(adapter: Any, tensors: dict[str, Any]) -> Any:
    paths = [site.owner for site in adapter.sites]
    if adapter.method.name == "ia3":
        inputs = [site.owner for site in adapter.sites if f"{site.path}:input" in tensors]
        return peft.IA3Config(target_modules=paths, feedforward_modules=inputs)
    method = adapter.method
    here = {site.owner: method.at(site) for site in adapter.sites}
    return peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        use_rslora=method.rslora,
        lora_dropout=method.dropout,
        target_modules=paths,
        rank_pattern={path: own.rank for path, own in here.items()},
        alpha_pattern={path: own.alpha for path, own in here.items()},
        use_dora=method.name == "dora",
        lora_bias=getattr(method, "bias", False),
    )


def compare(model: Any, theirs: Any, batch: dict[str, torch.Tensor], close: float = CLOSE) -> None:
    """The outputs, and the gradients of every tensor for a random projection of them; dropout draws from one seed."""
    results = []
    for each in (model, theirs):
        torch.manual_seed(9)
        results.append(each(**batch).logits)
    assert relative(results[0], results[1]) < close
    direction = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2))
    for result in results:
        (result * direction).sum().backward()
    owners = {site.path: site.owner for site in adapters.adapters_of(model)["fr"].sites}
    largest = max(tensor.grad.norm() for tensor in tensors_of(model, "fr").values())
    for key, tensor in tensors_of(model, "fr").items():
        expected = their_tensor(theirs, owners, key).grad
        if expected.norm() < 1e-6 * largest:  # a bias of the keys moves no attention: rounding alone
            assert tensor.grad.norm() < 1e-5 * largest, key
        else:
            assert relative(tensor.grad, expected) < close, key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("label", FAMILY)
def test_outputs_and_gradients_are_pefts(name: str, label: str) -> None:
    base = tiny.build(name)
    model = attached(name, label, copy.deepcopy(base))
    plain = output(base, tiny.inputs(name, padded=True))
    assert relative(output(model, tiny.inputs(name, padded=True)), plain) > 1e-2
    compare(model, by_peft(model, base), tiny.inputs(name, padded=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("label", ["bias", "dora"])
def test_dropout_acts_where_pefts_does(name: str, label: str) -> None:
    base = tiny.build(name)
    model = attached(name, label, copy.deepcopy(base), dropout=0.3).train()
    compare(model, by_peft(model, base), tiny.inputs(name))
    torch.manual_seed(1)
    first = output(model, tiny.inputs(name))
    assert relative(output(model, tiny.inputs(name)), first) > 1e-3


@pytest.mark.parametrize("label", ["bias", "dora", "ia3"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_on_a_base_in_four_bits_it_is_pefts(name: str, label: str) -> None:
    base = tiny.build(name)
    adapters.quantize(base, "nf4", compute_dtype=torch.float32)
    model = attached(name, label, copy.deepcopy(base))
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # the repacking bug, see test_quantize.py
    base.is_loaded_in_4bit = True
    compare(model, by_peft(model, base), tiny.inputs(name))
