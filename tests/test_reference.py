"""The methods against independent implementations: stock PEFT with the same tensors, and references of a few lines."""

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


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert", "qwen3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_gives_the_outputs_and_gradients_of_peft(name: str, rslora: bool) -> None:
    model, batch = tiny.build(name), tiny.inputs(name, padded=True)
    stock = copy.deepcopy(model)
    adapters.attach(model, "lora", name="fr", rank=4, alpha=6.0, rslora=rslora)
    shake(model, "fr")
    ours = tensors_of(model, "fr")
    paths = [key.removesuffix(".weight:a") for key in ours if key.endswith(":a")]
    config = peft.LoraConfig(r=4, lora_alpha=6.0, use_rslora=rslora, target_modules=paths)
    theirs = peft.get_peft_model(stock, config).eval()
    with torch.no_grad():
        for path in paths:
            layer = theirs.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.copy_(ours[f"{path}.weight:a"])
            layer.lora_B["default"].weight.copy_(ours[f"{path}.weight:b"])
    assert relative(output(model, batch), output(theirs, batch)) < CLOSE

    direction = torch.randn(output(model, batch).shape, generator=torch.Generator().manual_seed(2))
    for each in (model, theirs):
        (each(**batch).logits * direction).sum().backward()
    for path in paths:
        layer = theirs.get_submodule(f"base_model.model.{path}")
        assert relative(ours[f"{path}.weight:a"].grad, layer.lora_A["default"].weight.grad) < CLOSE
        assert relative(ours[f"{path}.weight:b"].grad, layer.lora_B["default"].weight.grad) < CLOSE


def test_dropout_keeps_the_mean_and_acts_only_in_training() -> None:
    model, batch = tiny.build("llama"), tiny.inputs("llama")
    adapters.attach(model, "lora", name="fr", rank=4, alpha=6.0, dropout=0.5, targets="mlp.down")
    shake(model, "fr")
    still = output(model, batch)
    assert torch.equal(output(model, batch), still)
    model.train()
    torch.manual_seed(0)
    first, second = output(model, batch), output(model, batch)
    assert not torch.equal(first, second)
    mean = torch.stack([output(model, batch) for _ in range(400)]).mean(0)
    assert relative(mean, still) < 0.2 * relative(first, still)


class Houlsby(nn.Module):
    """An independent bottleneck: residual around down, activation, up."""

    def __init__(self, p: dict[str, torch.Tensor], scale: float) -> None:
        super().__init__()
        self.p, self.scale = p, scale

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.linear(h, self.p["down"], self.p["down_bias"]).relu()
        return self.scale * nn.functional.linear(inner, self.p["up"], self.p["up_bias"])


def after(module: nn.Module, bottleneck: nn.Module, parallel: bool, source: nn.Module) -> None:
    """Adds the bottleneck with plain hooks: of the output, or of what `source` read."""
    seen: list[torch.Tensor] = []
    source.register_forward_pre_hook(
        lambda m, args, kw: seen.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )

    def hook(m: nn.Module, args: Any, result: Any) -> Any:
        y = result[0] if isinstance(result, tuple) else result
        y = y + bottleneck(seen[-1] if parallel else y)
        return (y, *result[1:]) if isinstance(result, tuple) else y

    module.register_forward_hook(hook)


# where the papers put the layers, by hand: (attention branch, its input), (feed-forward branch, its input)
PLACES = {
    "llama": [
        ("model.layers.{}.self_attn", "model.layers.{}.self_attn"),
        ("model.layers.{}.mlp", "model.layers.{}.mlp"),
    ],
    "gpt2": [("transformer.h.{}.attn", "transformer.h.{}.attn"), ("transformer.h.{}.mlp", "transformer.h.{}.mlp")],
    "gpt_neox": [
        ("gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.attention"),
        ("gpt_neox.layers.{}.mlp", "gpt_neox.layers.{}.mlp"),
    ],
    "bert": [
        ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.attention.self.query"),
        ("bert.encoder.layer.{}.output.dense", "bert.encoder.layer.{}.intermediate.dense"),
    ],
}


@pytest.mark.parametrize("name", sorted(PLACES))
@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
def test_bottleneck_is_what_the_papers_draw(name: str, placement: str) -> None:
    model, batch = tiny.build(name), tiny.inputs(name, padded=True)
    reference = copy.deepcopy(model)
    scale = 4.0 if placement == "parallel" else 1.0
    adapters.attach(model, "bottleneck", name="fr", placement=placement, reduction_factor=5.0, scale=scale)
    shake(model, "fr")
    tensors = tensors_of(model, "fr")
    branches = PLACES[name] if placement == "houlsby" else PLACES[name][1:]
    assert len(tensors) == 4 * tiny.LAYERS * len(branches)
    for branch, source in branches:
        for layer in range(tiny.LAYERS):
            path = branch.format(layer)
            p = {key: tensors[f"{path}:{key}"].detach() for key in ("down", "down_bias", "up", "up_bias")}
            target, read = reference.get_submodule(path), reference.get_submodule(source.format(layer))
            after(target, Houlsby(p, scale), placement == "parallel", read)
    assert relative(output(model, batch), output(reference, batch)) < 1e-6


EXACT_PROMPT = ["llama", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2", "qwen3_moe"]


@pytest.mark.parametrize("name", EXACT_PROMPT)
def test_a_prefix_starts_as_its_text_in_front_of_the_input(name: str) -> None:
    class Tokenizer:
        def __call__(self, text: str, **kwargs: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    model, batch = tiny.build(name), tiny.inputs(name)
    text = [9, 77, 31, 120, 8]
    rows = batch["input_ids"].shape[0]
    together = torch.cat([torch.tensor([text]).expand(rows, -1), batch["input_ids"]], 1)
    expected = output(model, {"input_ids": together})[:, len(text) :]
    adapters.attach(model, "prefix", text=" ".join(map(str, text)), tokenizer=Tokenizer())
    assert relative(output(model, batch), expected) < CLOSE


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_left_padding_changes_nothing_behind_a_prefix(name: str) -> None:
    model, batch = tiny.build(name), tiny.inputs(name)
    adapters.attach(model, "prefix", name="fr", length=4)
    shake(model, "fr")
    alone = output(model, {key: value[:1, :5] for key, value in batch.items()})
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), batch["input_ids"][:1, :5]], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)], 1)
    padded = output(model, {"input_ids": ids, "attention_mask": mask})[:, 3:]
    assert relative(padded, alone) < CLOSE


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generating_with_a_cache_equals_recomputing(name: str) -> None:
    model, batch = tiny.build(name), tiny.inputs(name, padded=False)
    adapters.attach(model, "prefix", name="fr", length=4)
    shake(model, "fr")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**batch, **settings, use_cache=True)
    again = model.generate(**batch, **settings, use_cache=False)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefix_is_the_same_under_every_attention(attention: str) -> None:
    batch = tiny.inputs("llama", padded=True)
    results = []
    for implementation in ("sdpa", attention):
        model = tiny.build("llama")
        model.set_attn_implementation(implementation)
        adapters.attach(model, "prefix", name="fr", length=4)
        shake(model, "fr")
        found = output(model, batch)
        results.append(found[batch["attention_mask"].bool()])
        unmasked = {"input_ids": batch["input_ids"]}
        results.append(output(model, unmasked))
    assert relative(results[2], results[0]) < CLOSE
    assert relative(results[3], results[1]) < CLOSE
