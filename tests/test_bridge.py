"""An attached model as a `PeftModel`: every member answered or refused, the same object, the same numbers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import output, shake, shake_trained
from torch import nn

import adapters
from adapters._attach import adapters_of, tensors_of
from adapters._attach.swap import base_class

peft = pytest.importorskip("peft")

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "ia3": {},
    "bottleneck": {"reduction_factor": 8},
    "prefix": {},
}
# what a module has anyway, and PeftModel has only because it wraps one
OF_THE_BASE = {"forward", "generate"}


def joined(method: str = "lora", name: str = "fr", base: str = "llama", **options: Any) -> Any:
    model = tiny.build(base)
    torch.manual_seed(3)
    return peft.get_peft_model(model, adapters.peft_config(method, **{**METHODS[method], **options}), adapter_name=name)


def shaken(method: str = "lora", name: str = "fr", **options: Any) -> Any:
    model = joined(method, name, **options)
    shake(model, name, 11, 0.08)
    return model


def test_every_member_of_a_peft_model_is_answered_or_refused() -> None:
    from adapters._bridge.face import REFUSED, PeftFace

    members = {name for name in vars(peft.PeftModel) if not name.startswith("__")}
    assert len(members) >= 35
    assert members - OF_THE_BASE - vars(PeftFace).keys() == set()
    model = joined()
    for name in REFUSED:
        with pytest.raises(adapters.AdapterError, match=f"PeftModel.{name} has no meaning"):
            getattr(model, name)()


def test_peft_is_not_imported_and_a_model_attached_before_becomes_one_of_its(tmp_path: Path) -> None:
    code = """
import sys; sys.path[:0] = ["tests"]
import tiny, torch, adapters, copy
model = tiny.build("llama")
adapters.attach(model, "lora", rank=2)
keys, cls = list(model.state_dict()), type(model)
unbridged = copy.deepcopy(model)
assert "peft" not in sys.modules, "attaching imported peft"
import peft
for each in (model, unbridged, copy.deepcopy(model)):
    assert isinstance(each, peft.PeftModel)
    assert issubclass(type(each), cls.__mro__[1]) and type(each).__module__ == cls.__module__
assert list(model.state_dict()) == keys
adapters.detach(model)
assert not isinstance(model, peft.PeftModel) and "peft" not in type(model).__module__
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip().endswith("done"), run.stderr[-2000:]


@pytest.mark.parametrize("method", METHODS)
def test_get_peft_model_is_attach(method: str) -> None:
    base = tiny.build("llama")
    expected = tiny.build("llama")
    torch.manual_seed(3)
    adapters.attach(expected, method, name="fr", **METHODS[method])
    shake(expected, "fr", 11, 0.08)
    keys = list(base.state_dict())
    torch.manual_seed(3)
    model = peft.get_peft_model(base, adapters.peft_config(method, **METHODS[method]), adapter_name="fr")
    assert model is base
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, base_class(model))
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    shake(model, "fr", 11, 0.08)
    inputs = tiny.inputs(model)
    assert torch.equal(output(model, inputs), output(expected, inputs))
    assert not torch.equal(output(model, inputs), output(tiny.build("llama"), inputs))


@pytest.mark.parametrize("method", METHODS)
def test_disabled_is_the_base_and_saved_is_loaded(method: str, tmp_path: Path) -> None:
    model, inputs = shaken(method), tiny.inputs(tiny.build("llama"))
    acting = output(model, inputs)
    with model.disable_adapter():
        off = output(model, inputs)
    frozen = tiny.build("llama").requires_grad_(False)
    assert torch.equal(off, output(frozen, inputs))
    assert torch.equal(output(model, inputs), acting)
    model.save_pretrained(str(tmp_path))
    again = tiny.build("llama")
    back = peft.PeftModel.from_pretrained(again, str(tmp_path), adapter_name="de")
    if method in ("bottleneck", "prefix"):  # the others are stock PEFT's own: tests/test_interop_peft.py
        assert back is again
        assert torch.equal(output(back, inputs), acting)
        assert back.active_adapters == ["de"]
        assert not any(parameter.requires_grad for parameter in back.parameters())
    fresh = joined(method)
    fresh.load_adapter(str(tmp_path), "fr", is_trainable=True)
    assert torch.equal(output(fresh, inputs), acting)


def test_switching_follows_pefts_rules() -> None:
    model = shaken(name="default")
    model.add_adapter("other", adapters.peft_config("bottleneck", reduction_factor=4))
    assert model.active_adapters == ["default"]
    assert [name for name, each in adapters_of(model).items() if each.trainable] == ["default"]
    shake(model, "other", 12, 0.08)
    first = output(model, tiny.inputs(model))
    model.set_adapter("other")
    assert model.active_adapter == "other"
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(tensor) for tensor in tensors_of(model, "other").values()}
    assert not torch.equal(output(model, tiny.inputs(model)), first)
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(output(model, tiny.inputs(model)), first)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad("default")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert model.get_nb_trainable_parameters()[0] == sum(t.numel() for t in tensors_of(model, "default").values())


def test_the_reference_that_trainers_add_is_a_copy() -> None:
    model = shaken(name="default")
    model.add_adapter("ref", model.peft_config["default"])
    before = {key: tensor.clone() for key, tensor in tensors_of(model, "ref").items()}
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(model, "default").items())
    shake(model, "default", 13, 0.08)
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(model, "ref").items())
    assert not any(tensor.requires_grad for tensor in tensors_of(model, "ref").values())


def test_default_also_means_the_one_that_trains() -> None:
    model = joined(name="fr")
    assert model.peft_config["default"].source.name == "fr"
    assert "default" not in model.peft_config
    adapters.attach(model, "lora", name="de", rank=2)
    with pytest.raises(KeyError):
        model.peft_config["default"]


def test_merge_and_unload_gives_a_plain_model() -> None:
    model, inputs = shaken(), tiny.inputs(tiny.build("llama"))
    acting = output(model, inputs)
    merged = model.merge_and_unload()
    assert merged is model
    assert type(merged) is type(tiny.build("llama"))
    assert (output(merged, inputs) - acting).abs().max() < 1e-4 * acting.abs().max()
    prefix = shaken("prefix")
    with pytest.raises(adapters.AdapterError, match="prefix"):
        prefix.merge_and_unload()
    assert isinstance(prefix.unload(), type(tiny.build("llama")))
    assert not isinstance(prefix, peft.PeftModel)


def test_copies_pickles_and_compiled_models_stay_peft_models() -> None:
    model, inputs = shaken(), tiny.inputs(tiny.build("llama"))
    acting = output(model, inputs)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(made, peft.PeftModel)
        assert torch.equal(output(made, inputs), acting)
    compiled: Any = torch.compile(model, backend="eager")
    assert (output(compiled, inputs) - acting).abs().max() < 1e-5


def test_status_and_counts_are_what_is_attached() -> None:
    model = shaken(targets="mlp.*")
    layers = model.get_layer_status()
    assert {layer.name for layer in layers} == {site.path for site in adapters_of(model)["fr"].sites}
    assert all(layer.requires_grad == {"fr": True} and layer.active_adapters == ["fr"] for layer in layers)
    whole = model.get_model_status()
    assert (whole.num_adapter_layers, whole.base_model_type, whole.enabled) == (6, "LlamaForCausalLM", True)
    assert whole.trainable_params == sum(t.numel() for t in tensors_of(model, "fr").values())
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_pefts_own_configurations_are_not_mixed_in() -> None:
    with pytest.raises(adapters.AdapterError, match=r"adapters\.peft_config"):
        joined().add_adapter("more", peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(adapters.AdapterError, match="did you mean 'rank'"):
        adapters.peft_config("lora", ranc=4)


def test_neftune_and_label_names_find_the_base() -> None:
    model = joined()
    assert model.get_base_model() is model
    assert model.base_model.model.get_input_embeddings() is model.get_input_embeddings()
    assert isinstance(model.base_model, nn.Module)
    assert model.base_model is model.model


def test_an_adapter_on_the_head_is_refused_where_the_head_is_not_run() -> None:
    trl = pytest.importorskip("trl.trainer.utils")
    model = tiny.build("llama")
    adapters.attach(model, "lora", rank=2, targets="head")
    trl.add_fused_lm_head(model)
    inputs = tiny.inputs(model)
    with pytest.raises(adapters.AdapterError, match="acts on the output embeddings"):
        model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
    with adapters.using(model, None):
        assert model(**inputs, labels=inputs["input_ids"], fused_lm_head=True).loss.isfinite()


STOCK: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "rslora": lambda: peft.LoraConfig(r=3, use_rslora=True, target_modules=["v_proj"], rank_pattern={"v_proj": 2}),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["o_proj", "up_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def stock(kind: str) -> Any:
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(tiny.build("llama"), STOCK[kind]())
    shake_trained(wrapped)
    return wrapped


@pytest.mark.parametrize("kind", STOCK)
def test_a_live_model_of_pefts_is_adopted(kind: str) -> None:
    wrapped = stock(kind)
    base, inputs = wrapped.get_base_model(), tiny.inputs(tiny.build("llama"))
    with torch.no_grad():
        expected = wrapped(**inputs).logits
    count = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    model = adapters.adopt(wrapped)
    assert model is base
    assert (output(model, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    if kind != "prefix":  # PEFT stores the prefix of a Llama once more for heads that share keys
        assert sum(tensor.numel() for tensor in tensors_of(model, "default").values()) == count
    assert all(tensor.requires_grad for tensor in tensors_of(model, "default").values())
    with adapters.using(model, None):
        assert torch.equal(output(model, inputs), output(tiny.build("llama").requires_grad_(False), inputs))
    adapters.detach(model)
    assert list(model.state_dict()) == list(tiny.build("llama").state_dict())


def test_several_adapters_are_adopted_and_what_is_not_known_leaves_all_as_it_was() -> None:
    wrapped = stock("lora")
    wrapped.add_adapter("more", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    wrapped.set_adapter("more")
    model = adapters.adopt(wrapped)
    assert list(adapters_of(model)) == ["default", "more"]
    assert [each.name for each in adapters_of(model).values() if each.trainable] == ["more"]  # as PEFT had it
    other = peft.get_peft_model(tiny.build("llama"), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    before, inputs = other.state_dict(), tiny.inputs(tiny.build("llama"))
    expected = other(**inputs).logits
    with pytest.raises(adapters.AdapterError):
        adapters.adopt(other)
    assert list(other.state_dict()) == list(before)
    assert torch.equal(other(**inputs).logits, expected)
    for wrong in (tiny.build("llama"), model):
        with pytest.raises(adapters.AdapterError, match="stock PEFT"):
            adapters.adopt(wrong)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.merge_adapter(), "are merged into this model"),
        (
            lambda model: [layer.scale_layer(3.0) for layer in model.modules() if hasattr(layer, "scale_layer")],
            "scaled",
        ),
        (lambda model: model.base_model.set_adapter(["default", "more"]), "one adapter may act"),
    ],
)
def test_what_acts_otherwise_than_its_files_say_is_not_adopted(change: Any, why: str) -> None:
    wrapped, inputs = stock("lora"), tiny.inputs(tiny.build("llama"))
    wrapped.add_adapter("more", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    change(wrapped)
    expected = wrapped(**inputs).logits
    with pytest.raises(adapters.AdapterError, match=why):
        adapters.adopt(wrapped)
    assert torch.equal(wrapped(**inputs).logits, expected)


def test_layers_that_peft_has_switched_off_stay_off() -> None:
    wrapped, inputs = stock("lora"), tiny.inputs(tiny.build("llama"))
    wrapped.base_model.disable_adapter_layers()
    model = adapters.adopt(wrapped)
    assert torch.equal(output(model, inputs), output(tiny.build("llama").requires_grad_(False), inputs))


@pytest.mark.parametrize("base", ["llama", "gpt2", "gpt_neox", "odd", "bert"])
def test_smoothed_labels_are_shifted_as_for_the_base(base: str, tmp_path: Path) -> None:
    """transformers asks `base_model.model` for the name of the model, and shifts labels for causal ones."""
    hf = pytest.importorskip("transformers")

    def loss(model: Any) -> float:
        settings = {"use_cpu": True, "report_to": [], "label_smoothing_factor": 0.2}
        trainer = hf.Trainer(model, hf.TrainingArguments(str(tmp_path), **settings))
        inputs = {**tiny.inputs(model), "labels": tiny.inputs(model, seed=4)["input_ids"]}
        return float(trainer.compute_loss(model.eval(), inputs))

    model = tiny.build(base)
    adapters.attach(model, "lora", rank=2)
    assert loss(model) == pytest.approx(loss(tiny.build(base)), rel=1e-6)


def test_a_configuration_means_the_same_on_another_model() -> None:
    model, other = joined(targets="mlp.*", dtype=torch.bfloat16), tiny.build("llama")
    peft.get_peft_model(other, model.peft_config["fr"], adapter_name="fr")
    sites = [[site.path for site in adapters_of(each)["fr"].sites] for each in (model, other)]
    assert sites[0] == sites[1]
    assert {tensor.dtype for tensor in tensors_of(other, "fr").values()} == {torch.bfloat16}
    shake(model, "fr", 2, 0.1)
    third = joined(name="fr")
    third.add_adapter("ref", model.peft_config["fr"])  # another model's: fresh, and no copy of this one's
    assert sites[0] == [site.path for site in adapters_of(third)["ref"].sites]


def test_a_model_pickled_as_pefts_is_one_in_a_process_that_imports_it_later(tmp_path: Path) -> None:
    torch.save(shaken(), tmp_path / "model.pt")
    code = f"""
import sys; sys.path[:0] = ["tests"]
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert "peft" not in sys.modules
model.save_pretrained({str(tmp_path / "out")!r})
import peft, tiny, adapters
assert isinstance(model, peft.PeftModel)
fresh = tiny.build("llama")
adapters.attach(fresh, "lora", rank=4)
assert isinstance(fresh, peft.PeftModel)
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip().endswith("done"), run.stderr[-2000:]


def test_transformers_own_order_of_arguments_is_understood() -> None:
    model = joined(name="default")
    model.add_adapter(adapters.peft_config("lora", rank=2), "more")
    assert list(adapters_of(model)) == ["default", "more"]
    with pytest.raises(adapters.AdapterError, match=r"adapters\.peft_config"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "another")
