"""LoRA with patterns and biases, DoRA and IA3: stock PEFT with the same tensors, and what each refuses or reports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from laws import Dense, assert_same, output, relative, shake, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
from adapters._attach import base_weight, tensors_of
from adapters._attach.factored import formed_densely
from adapters._attach.weights import by_site

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


def by_definition(model: Any, base: Any) -> Any:
    """`base` with the weights and biases that the method defines."""
    adapter = adapters.adapters_of(model)["fr"]
    held = by_site({key: tensor.detach() for key, tensor in tensors_of(model, "fr").items()})
    with torch.no_grad():
        for site in adapter.sites:
            method, w, p = adapter.method.at(site), base_weight(base, site), held[site.path]
            w.stored.copy_(w.as_stored(method.weight(w.dense(), p)))
    return base


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("label", ["patterns", "dora", "ia3"])
def test_fused_experts_are_changed_without_being_formed(label: str, experts: str) -> None:
    base = tiny.build("qwen3_moe")
    method, options = FAMILY[label]
    options = {key: value for key, value in options.items() if "pattern" not in key}
    model = copy.deepcopy(base)
    adapters.attach(model, method, name="fr", targets=["mlp.gate_up", "mlp.down"], **options)
    shake(model, "fr", noise=0.3)
    for each in (base, model):
        each.set_experts_implementation(experts)
    before = formed_densely.total()
    found = model(**tiny.inputs("qwen3_moe"))
    found.logits.square().mean().backward()
    assert formed_densely.total() == before
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in tensors_of(model, "fr").values())
    plain = output(base, tiny.inputs("qwen3_moe"))
    assert relative(found.logits.detach(), plain) > 1e-2
    assert relative(found.logits.detach(), output(by_definition(model, base), tiny.inputs("qwen3_moe"))) < CLOSE


@pytest.mark.parametrize("label", ["dora", "ia3"])
def test_a_table_is_scaled_without_being_formed(label: str) -> None:
    base = tiny.build("gpt2")
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())  # untied
    base.config.tie_word_embeddings = False
    model = copy.deepcopy(base)
    report = adapters.attach(model, FAMILY[label][0], name="fr", targets=["embedding"])
    assert report.sites == {"embedding": 2}
    shake(model, "fr", noise=0.3)
    before = formed_densely.total()
    found = output(model, tiny.inputs("gpt2"))
    assert formed_densely.total() == before
    assert relative(found, output(base, tiny.inputs("gpt2"))) > 1e-2
    assert relative(found, output(by_definition(model, base), tiny.inputs("gpt2"))) < CLOSE
    assert any("read" in note for note in report.notes) == (label == "ia3")


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_before_anything_changes() -> None:
    model = tiny.build("llama", torch.bfloat16)
    before = snapshot(model)
    for wrong, match in (
        ({"rank_pattern": {"mpl.down": 2}}, r"rank_pattern has the key 'mpl.down'.*did you mean 'mlp.down'"),
        ({"alpha_pattern": {"q_porj": 2.0}}, r"alpha_pattern has the key 'q_porj'.*did you mean 'q_proj'"),
        ({"rank_pattern": {"mlp.down": 2}, "targets": "attention.*"}, "none of the 8 chosen sites"),
        ({"rank_pattern": {"mlp.down": 0}}, "'mlp.down' the value 0; it must be a whole number, at least 1"),
        ({"alpha_pattern": {"mlp.down": "4"}}, "'mlp.down' the value '4'; it must be a number"),
        ({"rank_pattern": 4}, "rank_pattern is 4; it maps targets to values"),
    ):
        for method in ("lora", "qlora", "dora"):
            with pytest.raises(adapters.AdapterError, match=match) as caught:
                adapters.attach(model, method, **wrong)
            assert "\n" not in str(caught.value)
            assert_same(snapshot(model), before)
    with pytest.raises(adapters.AdapterError, match=r"feedforward has the key 'mlp\.downs'"):
        adapters.attach(model, "ia3", feedforward=("mlp.downs",))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_the_first_pattern_that_matches_holds_also_after_saving(method: str, tmp_path: Path) -> None:
    patterns = {"mlp.*": 2, "*.layers.1.*": 3, "attention.query": 5}
    model = tiny.build("llama")
    adapters.attach(model, method, name="fr", rank=4, alpha=8.0, rank_pattern=patterns, alpha_pattern={"q_proj": 5.0})
    patterns["mlp.*"] = 9  # the caller's own mapping
    shake(model, "fr")
    tensors = tensors_of(model, "fr")
    rank = {key: tensor.shape[0] for key, tensor in tensors.items() if key.endswith(":a")}
    layer = "model.layers.{}.{}.weight:a"
    expected = {"self_attn.q_proj": (5, 3), "self_attn.k_proj": (4, 3), "mlp.up_proj": (2, 2)}
    for path, ranks in expected.items():
        assert tuple(rank[layer.format(i, path)] for i in (0, 1)) == ranks, path
    held = adapters.adapters_of(model)["fr"]
    queries = [site for site in held.sites if site.role == "attention.query"]
    assert [held.method.at(site).alpha for site in queries] == [5.0, 5.0]
    adapters.save(model, "fr", tmp_path)
    again = tiny.build("llama")
    if method == "qlora":
        adapters.quantize(again)
    adapters.load(again, tmp_path, name="fr")
    assert adapters.adapters_of(again)["fr"].method == held.method
    assert list(adapters.adapters_of(again)["fr"].method.rank_pattern) == list(held.method.rank_pattern)
    assert torch.equal(output(again, tiny.inputs("llama")), output(model, tiny.inputs("llama")))


def test_a_bias_that_cannot_be_merged_is_reported_and_refused() -> None:
    model = tiny.build("llama")
    report = adapters.attach(model, "lora", name="fr", bias=True)
    assert any("14 layers have no bias to merge one into" in note for note in report.notes)
    shake(model, "fr")
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match=r"trains a bias at model\.layers\.0.*cannot be merged"):
        adapters.merge(model, "fr")
    assert_same(snapshot(model), before)
    assert adapters.attach(tiny.build("bert"), "lora", name="fr", bias=True).notes == ()
    experts = adapters.attach(tiny.build("qwen3_moe"), "lora", bias=True, targets="mlp.*")
    assert any("sites train no bias, as their weight is read" in note for note in experts.notes)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("label", ["bias", "ia3", "dora"])
def test_a_merge_out_of_four_bits_takes_the_bias_along(name: str, label: str) -> None:
    model = tiny.build(name)
    adapters.quantize(model, "nf4", compute_dtype=torch.float32)
    attached(name, label, model)
    adapted = output(model, tiny.inputs(name))
    certificate = adapters.merge(model, "fr", example=tiny.inputs(name))
    assert relative(output(model, tiny.inputs(name)), adapted) < CLOSE < certificate.effect


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_fresh_dora_with_tensors_in_16_bits_is_the_base(base: torch.dtype) -> None:
    model = tiny.build("llama", base)
    expected = output(model, tiny.inputs("llama"))
    adapters.attach(model, "dora", name="fr", dtype=torch.bfloat16)
    dtypes = {key.rpartition(":")[2]: tensor.dtype for key, tensor in tensors_of(model, "fr").items()}
    assert dtypes == {"a": torch.bfloat16, "b": torch.bfloat16, "magnitude": torch.float32}
    assert torch.equal(output(model, tiny.inputs("llama")), expected)
    shake(model, "fr")
    adapted = output(model, tiny.inputs("llama"))
    assert relative(adapted, expected) > 1e-2
    adapters.merge(model, "fr", example=tiny.inputs("llama"))
    assert relative(output(model, tiny.inputs("llama")), adapted) < (1e-4 if base == torch.float32 else 5e-2)


def test_a_row_of_zeros_makes_no_dora_that_is_not_a_number() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    expected = output(model, tiny.inputs("llama"))
    adapters.attach(model, "dora", name="fr")
    assert torch.equal(output(model, tiny.inputs("llama")), expected)
    model(**tiny.inputs("llama")).logits.square().mean().backward()
    assert all(tensor.grad is None or torch.isfinite(tensor.grad).all() for tensor in model.parameters())


def test_the_norm_follows_a_base_that_is_loaded_anew() -> None:
    model = attached("llama", "dora")
    output(model, tiny.inputs("llama"))
    other = tiny.build("llama", seed=5)
    model.load_state_dict(other.state_dict())
    fresh = by_peft(model, other)
    assert relative(output(model, tiny.inputs("llama")), output(fresh, tiny.inputs("llama"))) < CLOSE


class Products(TorchDispatchMode):
    """The shapes that matrix products make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(made.shape))
        return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_ia3_costs_no_product_and_dora_forms_no_dense_change(name: str) -> None:
    shapes = {}
    for label, model in {
        "base": tiny.build(name),
        "ia3": attached(name, "ia3"),
        "rsdora": attached(name, "rsdora"),
    }.items():
        with Products() as products:
            output(model, tiny.inputs(name))
        shapes[label] = products.shapes
    assert shapes["ia3"] == shapes["base"]
    weights = {tuple(p.shape) for p in tiny.build(name).parameters() if p.dim() > 1 and min(p.shape[-2:]) > 4}
    both = weights | {(*shape[:-2], shape[-1], shape[-2]) for shape in weights}
    assert not both & set(shapes["rsdora"])


def test_an_offloaded_weight_is_refused_by_those_that_read_it() -> None:
    model = tiny.build("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(adapters.AdapterError, match="offloaded"):
        adapters.attach(model, "dora")


@pytest.mark.parametrize("label", FAMILY)
def test_one_row_of_tensors_for_each_row_of_the_batch_is_each_by_itself(label: str) -> None:
    """The formulas hold with a leading row dimension, on which batches of several adapters rest."""
    model = attached("bert", label)
    held = by_site({key: tensor.detach().double() for key, tensor in tensors_of(model, "fr").items()})
    adapter = adapters.adapters_of(model)["fr"]
    for site in adapter.sites[:7]:
        w = base_weight(model, site)
        handle = Dense(w.dense().double(), None if w.bias() is None else w.bias().double())
        method = adapter.method.at(site)
        each = [{k: t + 0.1 * i * torch.rand_like(t) for k, t in held[site.path].items()} for i in range(3)]
        together = {key: torch.stack([p[key] for p in each]) for key in each[0]}
        x = torch.randn(3, 5, site.n_in, dtype=torch.float64)
        y = x @ handle.dense().mT + handle.bias()
        found = method.delta(x, y, handle, together)
        for i, p in enumerate(each):
            assert relative(found[i], method.delta(x[i : i + 1], y[i : i + 1], handle, p)[0]) < 1e-9, site.path


class TwoVectors(nn.Module):
    """A linear layer with two biases, neither of which is called so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.first, self.second = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.first + self.second


class Summed(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = TwoVectors(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.layer(x).relu())


@pytest.mark.parametrize(("method", "options"), [("dora", {}), ("ia3", {}), ("lora", {"bias": True})])
def test_what_a_layer_adds_is_its_bias_whatever_it_is_called(method: str, options: dict[str, Any]) -> None:
    model, x = Summed(), torch.randn(2, 3, 8)
    expected = model(x)
    adapters.attach(model, method, name="fr", targets="layer", example={"x": x}, **options)
    assert torch.equal(model(x), expected)
    shake(model, "fr", noise=0.5)
    adapted = model(x)
    assert relative(adapted, expected) > 1e-2
    adapters.merge(model, "fr", example={"x": x})
    assert relative(model(x), adapted) < CLOSE
