"""PEFT folders both ways for rank and alpha patterns, biases, DoRA and IA3: equal outputs, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import shake
from safetensors.torch import load_file, save_file
from test_interop_peft import TARGETS, by_peft, logits, refused, same
from test_lora_family import FAMILY, attached

import adapters
from adapters._attach import tensors_of
from adapters._interop.patterns import from_peft, pattern_value, to_peft

peft = pytest.importorskip("peft")
NAMES = [name for name in tiny.NAMES if name not in ("qwen3_moe", "odd")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", FAMILY)
def test_stock_peft_reads_our_folder_and_we_read_it_without_our_record(name: str, label: str, tmp_path: Path) -> None:
    options = {"feedforward": ("attention.output",)} if label == "ia3 elsewhere" else {}
    model = attached(name, label, **options)
    assert adapters.save(model, "fr", tmp_path).peft == "written"
    expected = logits(model)
    same(logits(peft.PeftModel.from_pretrained(tiny.build(name), tmp_path).eval()), expected)
    (tmp_path / "adapter.json").unlink()
    again = tiny.build(name)
    adapters.load(again, tmp_path, name="fr")
    same(logits(again), expected)
    ours, theirs = tensors_of(model, "fr"), tensors_of(again, "fr")
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _patterns(name: str) -> Any:
    first, last = TARGETS[name][0], TARGETS[name][-1]
    ranks, alphas = {first: 2, rf".*\.1\..*{last}": 6}, {last: 9}
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], rank_pattern=ranks, alpha_pattern=alphas)


CONFIGURATIONS = {
    "patterns": _patterns,
    "lora_bias": lambda name: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], lora_bias=True),
    "trained biases": lambda name: peft.LoraConfig(r=4, target_modules=TARGETS[name], bias="lora_only"),
    "both biases": lambda name: peft.LoraConfig(r=4, target_modules=TARGETS[name], bias="lora_only", lora_bias=True),
    "dora": lambda name: peft.LoraConfig(r=4, target_modules=TARGETS[name], use_dora=True, use_rslora=True),
    "ia3": lambda name: peft.IA3Config(target_modules=TARGETS[name], feedforward_modules=TARGETS[name][-1:]),
    "ia3 by expression": lambda name: peft.IA3Config(
        target_modules=rf".*({'|'.join(TARGETS[name])})", feedforward_modules=rf".*\.0\..*{TARGETS[name][-1]}"
    ),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("label", CONFIGURATIONS)
def test_we_read_stock_pefts_folder(name: str, label: str, tmp_path: Path) -> None:
    expected = by_peft(name, tmp_path, CONFIGURATIONS[label](name))
    model = tiny.build(name)
    report = adapters.load(model, tmp_path, name="fr")
    same(logits(model), expected)
    assert (logits(model) - logits(tiny.build(name))).norm() > 1e-2 * expected.norm()
    trains_biases = label in ("trained biases", "both biases") and name in ("gpt2", "gpt_neox", "bert")
    assert any("biases" in note for note in report.notes) == trains_biases


def test_biases_that_were_trained_elsewhere_are_refused_by_name_and_untouched_ones_dropped(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query", "key", "value"], bias="all")
    by_peft("bert", tmp_path, config)
    refused("bert", tmp_path, r"trained bias of bert\.embeddings\.LayerNorm.*bias='lora_only'")
    path, base = tmp_path / "adapter_model.safetensors", dict(tiny.build("bert").named_parameters())
    held = load_file(path)
    for key in held:
        name = key.removeprefix("base_model.model.")
        if key.endswith(".bias") and "base_layer" not in key:
            held[key] = base[name.replace("predictions.decoder", "predictions")].detach().clone()
    save_file(held, path)
    model = tiny.build("bert")
    adapters.load(model, tmp_path, name="fr")
    same(logits(model), logits(peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path).eval()))
    missing = next(key for key in held if key.endswith("query.base_layer.bias"))
    save_file({key: tensor for key, tensor in held.items() if key != missing}, path)
    refused("bert", tmp_path, "lacks the bias of bert.encoder.layer.0.attention.self.query")


def test_biases_beside_dora_are_refused_once_they_were_trained(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query"], bias="lora_only", use_dora=True)
    by_peft("bert", tmp_path, config)
    refused("bert", tmp_path, "DoRA has no bias")


@pytest.mark.parametrize(
    ("config", "change", "match"),
    [
        (peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), lambda t: t[:-1], "magnitude_vector .*63"),
        (peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), lambda t: t[:-1], "lora_B.bias .*63"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), lambda t: t.mT, r"\[1, 64\].*\[64, 1\]"),
    ],
)
def test_tensors_of_other_shapes_are_refused(config: Any, change: Any, match: str, tmp_path: Path) -> None:
    by_peft("llama", tmp_path, config)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    small = {key: change(t).contiguous() if t.dim() == 1 or 1 in t.shape else t for key, t in held.items()}
    save_file(small, path)
    refused("llama", tmp_path, match)


def test_a_rank_that_the_file_and_the_patterns_disagree_on_is_refused(tmp_path: Path) -> None:
    by_peft("llama", tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {}}))
    refused("llama", tmp_path, "v_proj has the rank 2 in the file and 4")


def test_a_classifier_head_travels_with_ia3(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=[], task_type="SEQ_CLS")
    expected = by_peft("bert_classifier", tmp_path / "theirs", config)
    model = tiny.build("bert_classifier")
    adapters.load(model, tmp_path / "theirs", name="fr")
    same(logits(model), expected)
    assert adapters.save(model, "fr", tmp_path / "ours").peft == "written"
    theirs = peft.PeftModel.from_pretrained(tiny.build("bert_classifier"), tmp_path / "ours").eval()
    same(logits(theirs), expected)


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_fused_experts_have_no_peft_folder(method: str, tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe")
    adapters.attach(model, method, name="fr")
    shake(model, "fr")
    assert "read as a parameter" in adapters.save(model, "fr", tmp_path).peft


def test_patterns_of_paths_of_which_one_ends_another() -> None:
    values = {"q": 2, "a.q": 3, "b.q": 4, "c.k": 4}
    usual, patterns = from_peft(values, 4)
    assert usual == 4
    assert {path: first(patterns, path, usual) for path in values} == values
    assert to_peft(values, 4) is None  # sorted as JSON is, "q" would not come after "b.q", which has the usual value
    assert to_peft({"a.q": 3, "b.q": 4}, 4) == {"a.q": 3}
    assert pattern_value({"layers.0.*": 3}, "model.layers.0.q", 4) == 3


def first(patterns: dict[str, int], path: str, usual: int) -> int:
    """Our own rule: the first key that is the path, or ends it."""
    return next((value for key, value in patterns.items() if path == key or path.endswith(f".{key}")), usual)
