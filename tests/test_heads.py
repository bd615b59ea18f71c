"""Task heads: trained, saved and restored with the adapter, with their labels, swapped with it, and never wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from laws import assert_same, output, shake, snapshot

import adapters
from adapters._attach import adapters_of, tensors_of

BATCH = tiny.inputs("bert")
PICTURES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
HEADS = {
    "sequence": "classifier",
    "token": "classifier",
    "span": "qa_outputs",
    "causal sequence": "score",
    "causal token": "score",
    "image": "classifier",
}


def model(kind: str, labels: int = 3) -> Any:
    """A classifier of a kind, with labels of its own and a random head."""
    names = {i: f"{kind}-{i}" for i in range(labels)}
    named = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    torch.manual_seed(0)
    if kind == "image":
        config = hf.ViTConfig(**PICTURES, image_size=32, patch_size=8, **named)
        return hf.ViTForImageClassification(config).eval()
    if kind.startswith("causal"):
        causal = {"causal sequence": hf.LlamaForSequenceClassification, "causal token": hf.LlamaForTokenClassification}
        return causal[kind](hf.LlamaConfig(**tiny._GROUPED, **named)).eval()
    bert = {
        "sequence": hf.BertForSequenceClassification,
        "token": hf.BertForTokenClassification,
        "span": hf.BertForQuestionAnswering,
    }
    return bert[kind](hf.BertConfig(**tiny._BERT, **(named if kind != "span" else {}))).eval()


def batch(kind: str) -> dict[str, Any]:
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    return BATCH


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_trained_saved_and_restored_and_never_wrapped(kind: str, tmp_path: Path) -> None:
    trained = model(kind)
    report = adapters.attach(trained, "lora", name="a", targets="all")
    assert report.head == (HEADS[kind],)
    assert not any(site.path.startswith(f"{HEADS[kind]}.") for site in adapters_of(trained)["a"].sites)
    shake(trained, "a")
    result = trained(**batch(kind))
    sum(value.float().pow(2).sum() for value in result.values() if torch.is_tensor(value)).backward()
    heads = [tensor for key, tensor in tensors_of(trained, "a").items() if ":head." in key]
    assert heads
    assert all(tensor.grad is not None and tensor.grad.norm() > 0 for tensor in heads)
    adapters.save(trained, "a", tmp_path)

    fresh = model(kind)
    with torch.no_grad():  # a head is initialised afresh wherever the base is loaded; the adapter brings its own
        fresh.get_submodule(HEADS[kind]).weight.mul_(-2.0)
    adapters.load(fresh, tmp_path, name="b")
    assert torch.equal(output(fresh, batch(kind)), output(trained, batch(kind)))


def test_labels_come_and_go_with_the_adapter(tmp_path: Path) -> None:
    trained = model("sequence")
    adapters.attach(trained, "lora", name="a")
    adapters.save(trained, "a", tmp_path)
    assert adapters.inspect(tmp_path).labels == {"0": "sequence-0", "1": "sequence-1", "2": "sequence-2"}

    fresh = model("sequence")
    fresh.config.id2label, fresh.config.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
    report = adapters.load(fresh, tmp_path, name="a")
    assert any("sequence-0, sequence-1, sequence-2" in note for note in report.notes)
    assert fresh.config.id2label == {0: "sequence-0", 1: "sequence-1", 2: "sequence-2"}
    adapters.activate(fresh, None)
    assert fresh.config.id2label == {0: "x", 1: "y", 2: "z"}
    adapters.activate(fresh, "a")
    assert fresh.config.label2id == {"sequence-0": 0, "sequence-1": 1, "sequence-2": 2}
    adapters.detach(fresh)
    assert fresh.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert fresh.config.label2id == {"x": 0, "y": 1, "z": 2}


@pytest.mark.parametrize("kind", ["sequence", "token", "causal sequence"])
def test_heads_of_different_sizes_share_a_base_and_are_swapped(kind: str, tmp_path: Path) -> None:
    folders, expected = {}, {}
    for labels in (3, 5):
        trained = model(kind, labels)
        adapters.attach(trained, "lora", name="a")
        shake(trained, "a", seed=labels)
        folders[labels], expected[labels] = tmp_path / str(labels), output(trained, batch(kind))
        adapters.save(trained, "a", folders[labels])

    base = model(kind, 3)
    before, plain = snapshot(base), output(base, batch(kind))
    adapters.load(base, folders[3], name="three")
    adapters.load(base, folders[5], name="five")
    for name, labels in (("five", 5), ("three", 3), ("five", 5)):
        adapters.activate(base, name)
        assert torch.equal(output(base, batch(kind)), expected[labels])
        assert len(base.config.id2label) == base.config.num_labels == base.num_labels == labels
    target = torch.zeros(3, 7, dtype=torch.long) if kind == "token" else torch.zeros(3, dtype=torch.long)
    assert base(**batch(kind), labels=target).loss.isfinite()

    adapters.swap(base, "five", folders[3])
    assert torch.equal(output(base, batch(kind)), expected[3])
    assert base.num_labels == 3
    adapters.detach(base)
    assert_same(snapshot(base), before)
    assert torch.equal(output(base, batch(kind)), plain)


def test_a_merged_head_stays_with_its_labels(tmp_path: Path) -> None:
    trained = model("sequence", 5)
    adapters.attach(trained, "lora", name="a")
    shake(trained, "a")
    adapters.save(trained, "a", tmp_path)
    base = model("sequence", 3)
    adapters.load(base, tmp_path, name="a")
    adapted = output(base, BATCH)
    adapters.merge(base, "a", example=BATCH)
    assert base.classifier.out_features == base.num_labels == len(base.config.id2label) == 5
    torch.testing.assert_close(output(base, BATCH), adapted, rtol=1e-4, atol=1e-4)
    base.save_pretrained(tmp_path / "merged")
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(again, BATCH), adapted, rtol=1e-4, atol=1e-4)


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    trained = model("sequence")
    adapters.attach(trained, "lora", name="a")
    adapters.save(trained, "a", tmp_path)
    other = model("span")
    before = snapshot(other)
    with pytest.raises(adapters.WrongBase, match="class"):
        adapters.load(other, tmp_path)
    assert_same(snapshot(other), before)
