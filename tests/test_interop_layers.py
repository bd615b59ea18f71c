"""LoRA on tables and convolutions: stock PEFT with the same tensors, and PEFT's folders both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from laws import relative, shake, shake_trained
from safetensors.torch import load_file, save_file
from torch import nn

import adapters
from adapters._attach import tensors_of

peft = pytest.importorskip("peft")
TIED = ("gemma2", "gpt2", "bert")  # to the head, which would be merged too
CLOSE = 1e-5  # relative, fp32


class Signal(nn.Module):
    """Convolutions over time and over volumes, strided and padded, which transformers' own models dilate or group."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Conv1d(6, 10, 3, stride=2, padding=1)
        self.volume = nn.Conv3d(1, 5, (3, 1, 2), bias=False)
        self.head = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.time(x).relu()
        x = self.volume(x.unflatten(1, (1, 5, 2)))
        return self.head(x.mean((-1, -2, -3)))


def _resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "num_labels": 5}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, downsample_in_first_stage=True))


BUILT: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "llama": (lambda: tiny.build("llama"), "ids", {}, "embed_tokens"),
    "gemma2": (lambda: tiny.build("gemma2"), "ids", {}, "embed_tokens"),  # the table multiplies what it looks up
    "gpt2": (lambda: tiny.build("gpt2"), "ids", {}, "wte"),
    "bert": (lambda: tiny.build("bert"), "ids", {}, "word_embeddings"),
    "resnet": (_resnet, "pixels", {}, "convolution"),
    "signal": (Signal, "signal", {"example": {"x": torch.randn(3, 6, 16)}}, "time"),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = BUILT[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
        for key, buffer in model.named_buffers():
            if "running" in key:
                buffer.add_(0.1 * torch.rand(buffer.shape))
    return model.eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if BUILT[name][1] == "ids":
        found = dict(tiny.inputs(name, padded=True))
        # padding looks up the table's row for it, which takes no gradient: PEFT's B does, where it meets that row
        kept = found["input_ids"].clamp(min=1)
        return {**found, "input_ids": torch.where(found["attention_mask"] == 0, 0, kept)}
    if BUILT[name][1] == "pixels":
        return {"pixel_values": torch.randn(3, 3, 40, 32, generator=generator)}
    return {"x": torch.randn(3, 6, 16, generator=generator)}


def output(model: Any, name: str) -> torch.Tensor:
    found = model(**batch(name))
    result: torch.Tensor = found if isinstance(found, torch.Tensor) else found.logits
    return result


def adapted(name: str, rank: int = 3, **options: Any) -> Any:
    """The base with shaken LoRA on its tables or convolutions and on one linear layer, where it has one in a block."""
    model = build(name)
    found = adapters.sites(model, example=BUILT[name][2].get("example"))
    paths = [site.path for site in found.weights if site.role == "embedding" or site.folded]
    linear = [site.path for site in found.weights if site.role == "mlp.down"][:1]
    adapters.attach(model, "lora", name="fr", targets=paths + linear, rank=rank, **BUILT[name][2], **options)
    shake(model, "fr")
    return model


def by_peft(name: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """A folder that PEFT wrote, for the same kinds of layers, all its tensors shaken."""
    targets = [BUILT[name][3], *(["volume", "head"] if name == "signal" else [])]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    model = peft.get_peft_model(build(name), config).eval()
    shake_trained(model)
    model.save_pretrained(folder)
    return model, output(model, name)


@pytest.mark.parametrize("name", BUILT)
def test_outputs_and_gradients_are_pefts_and_peft_reads_our_folder(name: str, tmp_path: Path) -> None:
    model = adapted(name, alpha=6.0)
    assert adapters.save(model, "fr", tmp_path).peft == "written"
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).eval()
    torch.manual_seed(1)
    ours, expected = output(model, name), output(theirs, name)
    assert relative(ours, expected) < CLOSE
    assert relative(expected, output(build(name), name)) > 1e-2
    direction = torch.randn(ours.shape)
    if BUILT[name][1] == "ids":
        direction = direction * batch(name)["attention_mask"][..., None]
    for result in (ours, expected):
        (result * direction).sum().backward()
    owners = {site.path: site.owner for site in adapters.adapters_of(model)["fr"].sites}
    held = dict(theirs.named_parameters())
    for key, tensor in tensors_of(model, "fr").items():
        path, _, part = key.rpartition(":")
        if path not in owners:  # a trained head, which no LoRA is on
            continue
        names = (f"lora_{part.upper()}.default.weight", f"lora_embedding_{part.upper()}.default")
        paths = [f"base_model.model.{owners[path]}.{each}" for each in names]
        gradient = next(held[each].grad for each in paths if each in held)
        assert relative(tensor.grad, gradient.reshape(tensor.shape)) < CLOSE, key


@pytest.mark.parametrize("name", BUILT)
def test_we_read_our_folder_with_and_without_our_record(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    adapters.save(model, "fr", tmp_path)
    expected = output(model, name)
    for step in ("record", "PEFT's files alone"):
        again = build(name)
        if step != "record":
            (tmp_path / "adapter.json").unlink()
            if name == "signal":  # what cannot be probed needs the caller's inputs, or a map of an adapter before
                adapters.attach(again, "lora", name="other", **BUILT[name][2])
        adapters.load(again, tmp_path, name="fr")
        assert torch.equal(output(again, name), expected), step
        ours, theirs = tensors_of(model, "fr"), tensors_of(again, "fr")
        assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize("name", [name for name in BUILT if name != "signal"])
def test_we_read_pefts_folder(name: str, tmp_path: Path) -> None:
    _, expected = by_peft(name, tmp_path)
    model = build(name)
    adapters.load(model, tmp_path, name="fr")
    assert relative(output(model, name), expected) < CLOSE
    assert relative(expected, output(build(name), name)) > 1e-2
    if name in TIED:
        with pytest.raises(adapters.AdapterError, match=r"is tied to .*untie them first"):
            adapters.merge(model, "fr")
    else:
        adapters.merge(model, "fr")
    assert relative(output(model, name), expected) < CLOSE


def test_a_table_that_grew_is_refused(tmp_path: Path) -> None:
    """PEFT stores the base's own table beside the adapter: it must be this model's."""
    by_peft("llama", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    key = next(key for key in held if key.endswith("embed_tokens.base_layer.weight"))
    held[key][3, 5] += 1
    save_file(held, path)
    model = build("llama")
    with pytest.raises(adapters.AdapterError, match="embed_tokens that are not this model's"):
        adapters.load(model, tmp_path, name="fr")
    assert not adapters.adapters_of(model)


def test_a_kernel_of_another_size_is_refused(tmp_path: Path) -> None:
    by_peft("resnet", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    key = next(key for key in held if key.endswith("embedder.convolution.lora_A.weight"))
    save_file({**held, key: held[key][..., :5].contiguous()}, path)
    with pytest.raises(adapters.AdapterError, match=r"\[4, 3, 7, 5\].*\[4, 3, 7, 7\]"):
        adapters.load(build("resnet"), tmp_path, name="fr")


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}])
def test_dora_and_biases_are_linear_layers_only(option: dict[str, Any], tmp_path: Path) -> None:
    model = peft.get_peft_model(build("resnet"), peft.LoraConfig(r=4, target_modules=["convolution"], **option))
    model.save_pretrained(tmp_path)
    with pytest.raises(adapters.AdapterError, match="only a linear layer can have"):
        adapters.load(build("resnet"), tmp_path, name="fr")


@pytest.mark.parametrize("change", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}])
def test_convolutions_that_peft_computes_otherwise_have_no_peft_folder(change: dict[str, Any], tmp_path: Path) -> None:
    model = build("signal")
    model.time = nn.Conv1d(6, 10, 3, stride=2, padding=2, **change)
    with torch.no_grad():
        example = {"x": torch.randn(3, 6, 18 if "dilation" not in change else 16)}
        size = model.time(example["x"]).shape[-1]
    model.forward = lambda x: model.head(model.volume(model.time(x).unflatten(1, (1, 5, 2))).mean((-1, -2, -3)))
    assert size > 1
    adapters.attach(model, "lora", name="fr", targets=["time.weight"], example=example)
    assert "time.weight" in adapters.save(model, "fr", tmp_path).peft


def test_a_sequential_does_not_run_what_is_attached_to_it() -> None:
    """ResNet's head is a Sequential, whose children are its layers: the trained copy beside them is not one."""
    model = build("resnet")
    base = list(model.classifier)
    adapters.attach(model, "lora", name="fr", targets=["encoder.*convolution*"])
    assert adapters.adapters_of(model)["fr"].head == ("classifier",)
    assert list(model.classifier) == base
    assert len(model.classifier) == len(base) == 2
    assert model.classifier[-1] is base[1]
    assert list(model.classifier[:1]) == base[:1]
    with pytest.raises(IndexError):
        model.classifier[2]
