"""What an attached model still is: the same object with the same keys, copyable, compilable, switchable at any time."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import assert_same, output, relative, shake, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
from adapters._attach import install, tensors_of

BATCH = tiny.inputs("llama")


def attached(name: str = "fr", method: str = "lora", seed: int = 11, **options: Any) -> Any:
    model = tiny.build("llama")
    torch.manual_seed(4)
    adapters.attach(model, method, name=name, **options)
    shake(model, name, seed)
    return model


def test_base_keys_types_and_parameters_stay() -> None:
    model = tiny.build("gemma2")  # tied embeddings
    keys, kind = list(model.state_dict()), type(model)
    adapters.attach(model, "lora")
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_plain_base_state_dict_still_loads_strictly() -> None:
    model, other = attached(), tiny.build("llama", seed=8)
    expected = output(other, BATCH)
    model.load_state_dict(other.state_dict(), strict=True)
    with adapters.using(model, None):
        assert torch.equal(output(model, BATCH), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(
            {key: value for key, value in other.state_dict().items() if "norm" not in key}, strict=True
        )


def test_an_attached_state_dict_round_trips() -> None:
    model, twin = attached(), attached(seed=99)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(twin, BATCH), output(model, BATCH))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bottleneck", "prefix"])
def test_copies_and_pickles_are_independent_models(method: str) -> None:
    model = attached(method=method)
    expected = output(model, BATCH)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, BATCH), expected)
        adapters.activate(twin, None)
        assert not torch.equal(output(twin, BATCH), expected)
        assert torch.equal(output(model, BATCH), expected)
        adapters.detach(twin)
        assert torch.equal(output(model, BATCH), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False), BATCH), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bottleneck"])
def test_compiled_equals_eager_attached_before_and_after(method: str) -> None:
    torch._dynamo.reset()
    model = attached(method=method)
    expected = output(model, BATCH)
    compiled = torch.compile(model, backend="aot_eager")
    assert relative(output(compiled, BATCH), expected) < 1e-6
    fresh = tiny.build("llama")
    compiled = torch.compile(fresh, backend="aot_eager")
    base = output(compiled, BATCH)
    torch.manual_seed(4)
    adapters.attach(fresh, method, name="fr")
    shake(fresh, "fr")
    assert relative(output(compiled, BATCH), expected) < 1e-6
    adapters.activate(fresh, None)
    assert relative(output(compiled, BATCH), base) < 1e-6


def test_accelerates_instance_level_forward_keeps_the_delta() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = attached()
    expected = output(model, BATCH)
    add_hook_to_module(model.model.layers[0].mlp.down_proj, ModelHook())
    assert torch.equal(output(model, BATCH), expected)


def test_using_holds_in_this_thread_only_and_nests() -> None:
    model = attached("fr")
    adapters.attach(model, "lora", name="de")
    shake(model, "de", 5)
    adapters.activate(model, "fr")
    fr = output(model, BATCH)
    found: list[torch.Tensor] = []
    with adapters.using(model, "de"):
        worker = threading.Thread(target=lambda: found.append(output(model, BATCH)))
        worker.start()
        worker.join()
        de = output(model, BATCH)
        with adapters.using(model, None):
            base = output(model, BATCH)
        assert torch.equal(output(model, BATCH), de)
    assert torch.equal(found[0], fr)
    assert torch.equal(output(model, BATCH), fr)
    assert len({tuple(t.flatten()[:4].tolist()) for t in (fr, de, base)}) == 3


def test_activation_never_changes_what_trains() -> None:
    model = attached("fr")
    adapters.attach(model, "lora", name="de")
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    for name in ("fr", None, "de"):
        adapters.activate(model, name)
        assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    with pytest.raises(adapters.AdapterError, match="attached: fr, de"):
        adapters.activate(model, "es")
    with pytest.raises(adapters.AdapterError, match=r"no adapter .es. is attached"):
        adapters.using(model, ["fr", "es"])


def test_names_are_free_text_and_the_same_name_twice_is_refused() -> None:
    model = tiny.build("llama")
    for name in ("fr.v2", "keys", "org/fr", "0", "mlp", "a b", "weight"):
        adapters.attach(model, "lora", name=name, rank=2)
    assert list(adapters.adapters_of(model)) == ["fr.v2", "keys", "org/fr", "0", "mlp", "a b", "weight"]
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match="attached already"):
        adapters.attach(model, "lora", name="mlp")
    assert_same(snapshot(model), before)


def test_swap_exchanges_everything_at_once_and_a_forward_under_way_keeps_its_version(tmp_path: Path) -> None:
    model = attached("fr", rank=4)
    adapters.save(model, "fr", tmp_path / "v1")
    old = output(model, BATCH)
    other = attached("fr", rank=7, seed=3, targets="attention.*")
    adapters.save(other, "fr", tmp_path / "v2")
    new = output(other, BATCH)

    def swap_in_the_middle(*_: Any) -> None:
        if adapters.adapters_of(model)["fr"].method.rank == 4:  # type: ignore[attr-defined]
            adapters.swap(model, "fr", tmp_path / "v2")

    handle = model.model.layers[0].mlp.register_forward_hook(swap_in_the_middle)
    assert torch.equal(output(model, BATCH), old)
    handle.remove()
    assert torch.equal(output(model, BATCH), new)
    gc.collect()
    slots = {path.split(".adapters.")[1].split(".")[0] for path, _ in model.named_parameters() if ".adapters." in path}
    assert slots == {adapters.adapters_of(model)["fr"].slot}
    adapters.detach(model)
    assert torch.equal(output(model, BATCH), output(tiny.build("llama"), BATCH))


def test_save_pretrained_writes_adapters_only(tmp_path: Path) -> None:
    model = attached("default")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path, name="default")
    assert torch.equal(output(fresh, BATCH), output(model, BATCH))


def test_a_head_that_two_adapters_train_belongs_to_each() -> None:
    model, batch = tiny.build("bert_classifier"), tiny.inputs("bert_classifier")
    untouched = model.classifier.weight.clone()
    report = adapters.attach(model, "lora", name="a")
    assert report.head == ("classifier",)
    assert any("classifier" in line for line in str(report).splitlines())
    adapters.attach(model, "lora", name="b", head=False)
    shake(model, "a")
    shake(model, "b")
    assert [key for key in tensors_of(model, "a") if "head." in key] == [
        "classifier:head.weight",
        "classifier:head.bias",
    ]
    assert not [key for key in tensors_of(model, "b") if "head." in key]
    assert torch.equal(model.classifier.weight, untouched)
    adapters.activate(model, "a")
    first = output(model, batch)
    adapters.activate(model, "b")
    assert not torch.equal(output(model, batch), first)
    with pytest.raises(adapters.AdapterError, match="no module 'clasifier'"):
        adapters.attach(model, "lora", name="c", head=["clasifier"])


def test_freezing_alone_changes_which_product_torch_makes_of_a_transposed_batch() -> None:
    """Why a fresh adapter is compared with the base that is frozen: Longformer, LED and FSMT transpose their states."""

    def products(layer: nn.Linear) -> list[str]:
        seen = []

        class Noting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        with Noting(), torch.no_grad():
            layer(torch.randn(5, 3, 8).transpose(0, 1))
        return [name for name in seen if "mm" in name]

    layer = nn.Linear(8, 6)
    trains, frozen = products(layer), products(layer.requires_grad_(False))
    assert trains
    assert frozen
    assert trains != frozen


def test_reports_count_what_is_there() -> None:
    model = tiny.build("qwen3_moe")
    report = adapters.attach(model, "lora", rank=2)
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.sites["mlp.gate_up"] == tiny.LAYERS
    text = str(report)
    assert "router" in str(report.left) or "routing" in str(report.left)
    assert "%" in text


def test_tensors_go_where_the_weights_are() -> None:
    """Files are read on the CPU; the device without data stands for an accelerator."""
    made = tiny.build("llama")
    adapters.attach(made, "lora", name="fr", rank=2)
    adapter, tensors = adapters.adapters_of(made)["fr"], {k: t.detach() for k, t in tensors_of(made, "fr").items()}
    model = tiny.build("llama")
    model.model.layers[1].to("meta")
    install(model, "fr", adapter.method, adapter.sites, tensors)
    found = {key: tensor.device.type for key, tensor in tensors_of(model, "fr").items()}
    assert {kind for key, kind in found.items() if ".layers.1." in key} == {"meta"}
    assert {kind for key, kind in found.items() if ".layers.0." in key} == {"cpu"}
