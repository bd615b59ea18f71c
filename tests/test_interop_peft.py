"""Our LoRA folders read by stock PEFT, PEFT's folders read by us: the same outputs, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import shake, shake_trained
from safetensors.torch import load_file, save_file
from torch import nn

import adapters
from adapters._interop.targets import shortest

peft = pytest.importorskip("peft")
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gemma2": ["o_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "bert": ["query", "output.dense"],
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny.inputs(model)).logits
    return found


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of summation: 1e-5 of the norm."""
    assert (found - expected).norm() < 1e-5 * expected.norm()


def by_peft(name: str, folder: Path, config: Any) -> torch.Tensor:
    """Writes a PEFT adapter whose tensors were all shaken, and returns what it computes."""
    model = peft.get_peft_model(tiny.build(name), config).eval()
    shake_trained(model)
    model.save_pretrained(folder)
    return logits(model)


def shaken(name: str, **options: Any) -> nn.Module:
    model: nn.Module = tiny.build(name)
    adapters.attach(model, options.pop("method", "lora"), name="fr", **options)
    shake(model, "fr")
    return model


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name not in ("qwen3_moe", "odd")])
@pytest.mark.parametrize("rslora", [False, True])
def test_stock_peft_reads_our_folder(name: str, rslora: bool, tmp_path: Path) -> None:
    model = shaken(name, rank=4, alpha=6.0, rslora=rslora)
    assert adapters.save(model, "fr", tmp_path).peft == "written"
    theirs = peft.PeftModel.from_pretrained(tiny.build(name), tmp_path).eval()
    same(logits(theirs), logits(model))
    assert not torch.equal(logits(theirs), logits(tiny.build(name)))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_stock_pefts_folder(name: str, rslora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], use_rslora=rslora, lora_dropout=0.1)
    expected = by_peft(name, tmp_path, config)
    model = tiny.build(name)
    report = adapters.load(model, tmp_path, name="fr")
    assert "could not be checked" in report.base
    same(logits(model), expected)


def test_a_classifier_head_travels_both_ways(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    expected = by_peft("bert_classifier", tmp_path / "theirs", config)
    model = tiny.build("bert_classifier")
    adapters.load(model, tmp_path / "theirs", name="fr")
    same(logits(model), expected)
    assert adapters.save(model, "fr", tmp_path / "ours").peft == "written"
    theirs = peft.PeftModel.from_pretrained(tiny.build("bert_classifier"), tmp_path / "ours").eval()
    same(logits(theirs), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_we_read_pefts_prefix(name: str, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    expected = by_peft(name, tmp_path, config)
    model = tiny.build(name)
    adapters.load(model, tmp_path, name="fr")
    same(logits(model), expected)
    assert not torch.allclose(expected, logits(tiny.build(name)))


def test_patterns_that_are_alike_everywhere_are_read_as_one_rank_and_alpha(tmp_path: Path) -> None:
    alike = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 7}
    )
    expected = by_peft("llama", tmp_path / "same", alike)
    model = tiny.build("llama")
    adapters.load(model, tmp_path / "same", name="fr")
    same(logits(model), expected)
    assert adapters.adapters_of(model)["fr"].method == adapters.methods.get("lora")(rank=5, alpha=7.0)


def refused(name: str, folder: Path, match: str) -> None:
    model = tiny.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(adapters.AdapterError, match=match) as caught:
        adapters.load(model, folder, name="fr")
    assert "\n" not in str(caught.value)
    assert adapters.adapters_of(model) == {}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "lacks lora_magnitude_vector of .*q_proj"),
        ({"lora_bias": True}, "lacks lora_B.bias of .*q_proj"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "lacks the rows of model.embed_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 8}, "rank 4"),
        ({"r": None}, "rank 4"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks the tensors of .*k_proj"),
    ],
)
def test_options_that_are_not_supported_are_refused_by_name(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    by_peft("llama", tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    refused("llama", tmp_path, match)


def test_every_tensor_of_pefts_file_is_accounted_for(tmp_path: Path) -> None:
    by_peft("llama", tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    key = next(key for key in whole if "lora_A" in key)
    save_file({**whole, "base_model.model.model.norm.weight": torch.ones(64)}, path)
    refused("llama", tmp_path, "no tensor of this adapter")
    save_file({other: tensor for other, tensor in whole.items() if other != key}, path)
    refused("llama", tmp_path, "lacks lora_A.weight of model.layers.0.self_attn.q_proj")
    layer = key.split(".self_attn")[0]
    save_file({other: tensor for other, tensor in whole.items() if not other.startswith(layer)}, path)
    refused("llama", tmp_path, "lacks the tensors of model.layers.0.self_attn.q_proj")
    save_file({**whole, key: whole[key] * float("nan")}, path)
    refused("llama", tmp_path, "not finite")
    save_file(whole, path)
    refused("gpt2", tmp_path, "no layer of this model that LoRA adapts")
    path.write_bytes(path.read_bytes()[:-7])
    refused("llama", tmp_path, "truncated or damaged")
    path.unlink()
    refused("llama", tmp_path, "missing")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "bottleneck"}, "no method that computes"),
        ({"method": "prefix"}, "positions='shifted'"),
    ],
)
def test_what_peft_cannot_express_is_marked_as_ours(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    report = adapters.save(shaken("llama", **options), "fr", tmp_path)
    assert why in report.peft
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADAPTERS"
    assert config["peft_type"] not in set(peft.PeftType)  # other programs refuse it rather than read it wrongly
    assert not {"r", "lora_alpha", "target_modules"} & config.keys()


def test_fused_experts_are_marked_as_ours(tmp_path: Path) -> None:
    report = adapters.save(shaken("qwen3_moe", targets="mlp.gate_up"), "fr", tmp_path)
    assert "PEFT keeps these tensors in another order" in report.peft
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ADAPTERS"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["l.0.a.q", "l.1.a.q"], ["q"]),
        (["l.0.a.dense", "l.1.a.dense"], ["a.dense"]),
        (["l.1.a.q"], ["1.a.q"]),
        (["l.0.a.q", "l.1.a.q", "l.0.b.dense"], ["0.b.dense", "q"]),
        (["q"], None),
    ],
)
def test_the_shortest_list_of_suffixes(wanted: list[str], expected: list[str] | None) -> None:
    names = [f"l.{i}.{branch}.{leaf}" for i in (0, 1) for branch, leaf in (("a", "q"), ("a", "dense"), ("b", "dense"))]
    assert shortest(wanted, [*names, "q"] if wanted == ["q"] else names) == expected
