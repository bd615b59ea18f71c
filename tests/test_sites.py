"""Sites are found by tracing: each tiny model's roles, shapes and places are known here by hand."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

import adapters
from adapters._contract import KeyValueMethod, StreamMethod, WeightMethod
from adapters._errors import AdapterError
from adapters._sites import SiteMap, select, sites

GATED = {"mlp.gate": 2, "mlp.up": 2, "mlp.down": 2}
PLAIN = {"mlp.up": 2, "mlp.down": 2}
SEPARATE = {"attention.query": 2, "attention.key": 2, "attention.value": 2, "attention.output": 2}
FUSED = {"attention.qkv": 2, "attention.output": 2}
ROLES = {
    "llama": {**SEPARATE, **GATED, "head": 1},
    "qwen3": {**SEPARATE, **GATED, "head": 1},
    "phi3": {**FUSED, "mlp.gate_up": 2, "mlp.down": 2, "head": 1},
    "gemma2": {**SEPARATE, **GATED, "embedding-tied": 1},
    "gpt2": {**FUSED, **PLAIN, "embedding-tied": 1},
    "gpt_neox": {**FUSED, **PLAIN, "head": 1},
    "bert": {**SEPARATE, **PLAIN, "head": 1, "embedding-tied": 1},
    "modernbert": {
        "attention.qkv": 3,
        "attention.output": 3,
        "mlp.gate_up": 3,
        "mlp.down": 3,
        "head": 1,
        "embedding-tied": 1,
    },
    "qwen3_moe": {**SEPARATE, "router": 2, "mlp.gate_up": 2, "mlp.down": 2, "head": 1},
    "bert_classifier": {**SEPARATE, **PLAIN, "head": 2},
    "odd": {**FUSED, "mlp.gate_up": 2, "mlp.down": 2, "head": 1},
}
# path of the attention's and the MLP's stream in block 0, with output, input and tap
STREAMS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "llama": (("model.layers.0.self_attn", 0, "hidden_states", None), ("model.layers.0.mlp", None, 0, None)),
    "qwen3": (("model.layers.0.self_attn", 0, "hidden_states", None), ("model.layers.0.mlp", None, 0, None)),
    "phi3": (("model.layers.0.self_attn", 0, "hidden_states", None), ("model.layers.0.mlp", None, 0, None)),
    # the norm after the sub-block has no access to the branch's input, the sub-block before it does
    "gemma2": (("model.layers.0.self_attn", 0, "hidden_states", None), ("model.layers.0.mlp", None, 0, None)),
    "gpt2": (("transformer.h.0.attn", 0, 0, None), ("transformer.h.0.mlp", None, 0, None)),
    "gpt_neox": (("gpt_neox.layers.0.attention", 0, 0, None), ("gpt_neox.layers.0.mlp", None, 0, None)),
    "bert": (
        ("bert.encoder.layer.0.attention.output.dense", None, None, "bert.encoder.layer.0.attention.self"),
        ("bert.encoder.layer.0.output.dense", None, None, "bert.encoder.layer.0.intermediate"),
    ),
    "modernbert": (("model.layers.0.attn", 0, 0, None), ("model.layers.0.mlp", None, 0, None)),
    "qwen3_moe": (("model.layers.0.self_attn", 0, "hidden_states", None), ("model.layers.0.mlp", None, 0, None)),
    "odd": (("storeys.0.gaze", None, 0, None), ("storeys.0.chew", None, 0, None)),
}
STREAMS["bert_classifier"] = STREAMS["bert"]
TABLES = {"gpt2": 2, "bert": 3, "bert_classifier": 3}  # positions, token types; one in the others
KEYVALUES = {  # path in block 0, heads, width, causal
    "llama": ("model.layers.0.self_attn", 2, 16, True),
    "qwen3": ("model.layers.0.self_attn", 2, 32, True),
    "phi3": ("model.layers.0.self_attn", 2, 16, True),
    "gemma2": ("model.layers.0.self_attn", 2, 16, True),
    "gpt2": ("transformer.h.0.attn", 4, 16, True),
    "gpt_neox": ("gpt_neox.layers.0.attention", 4, 16, True),
    "bert": ("bert.encoder.layer.0.attention.self", 4, 16, False),
    "modernbert": ("model.layers.0.attn", 4, 16, False),
    "qwen3_moe": ("model.layers.0.self_attn", 2, 16, True),
    "bert_classifier": ("bert.encoder.layer.0.attention.self", 4, 16, False),
    "odd": ("storeys.0.gaze", 4, 16, True),  # its attention is written by hand
}
MAPS: dict[str, SiteMap] = {}


def mapped(name: str) -> SiteMap:
    if name not in MAPS:
        MAPS[name] = sites(tiny.build(name))
    return MAPS[name]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_roles(name: str) -> None:
    expected = {**ROLES[name], "embedding": TABLES.get(name, 1)}
    assert Counter(site.role for site in mapped(name).weights) == expected


@pytest.mark.parametrize("name", tiny.NAMES)
def test_only_heads_routers_and_tied_weights_are_left_out_with_a_reason(name: str) -> None:
    for site in mapped(name).weights:
        aside = site.role in ("head", "router", "embedding-tied", "embedding")
        assert site.default is not aside
        assert bool(site.reason) is aside


@pytest.mark.parametrize("name", tiny.NAMES)
def test_streams(name: str) -> None:
    found = mapped(name).streams
    blocks = 3 if name == "modernbert" else 2
    assert [site.branch for site in found] == ["attention", "mlp"] * blocks
    assert {site.width for site in found} == {tiny.HIDDEN}
    first = [(site.path, site.output, site.input, site.tap) for site in found[:2]]
    assert tuple(first) == STREAMS[name]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_keys_and_values(name: str) -> None:
    found = mapped(name).keyvalues
    first = found[0]
    assert first.k_dim == first.v_dim
    assert (first.path, first.heads, first.k_dim, first.causal) == KEYVALUES[name]
    assert (first.product is None) is (name != "odd")
    assert len(found) == len(mapped(name).streams) // 2


def test_experts_are_one_read_site() -> None:
    found = {site.path: site for site in mapped("qwen3_moe").weights}
    gate_up = found["model.layers.1.mlp.experts.gate_up_proj"]
    down = found["model.layers.1.mlp.experts.down_proj"]
    assert gate_up.shape == (4, 128, 64)
    assert down.shape == (4, 64, 64)
    assert {gate_up.access, down.access, found["model.layers.0.mlp.gate.weight"].access} == {"read"}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_orientation_comes_from_the_call(name: str) -> None:
    for site in mapped(name).weights:
        assert site.transposed is ((name == "gpt2" and site.role != "embedding-tied") or site.role == "embedding")


def test_a_tied_weight_is_a_site_where_it_multiplies_and_one_where_it_is_looked_up_in() -> None:
    tied = [s for s in mapped("gpt2").weights if s.path in ("lm_head.weight", "transformer.wte.weight")]
    assert [(s.path, s.role, s.access, s.aliases) for s in tied] == [
        ("lm_head.weight", "embedding-tied", "call", ()),
        ("transformer.wte.weight", "embedding", "read", ()),
    ]
    assert (tied[1].n_in, tied[1].n_out) == (tiny.VOCAB, tiny.HIDDEN)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_coverage_counts_every_linear_weight(name: str) -> None:
    model = tiny.build(name)
    owners = (nn.Linear,) if name != "gpt2" else (nn.Linear, type(model.transformer.h[0].mlp.c_fc))
    linear = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, owners)}
    experts = {id(p): p.numel() for p in model.parameters() if p.dim() == 3}
    routers = {id(p): p.numel() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")}
    found = mapped(name)
    assert found.total_size == sum({**linear, **experts, **routers}.values())
    heads = {id(p): p.numel() for p in _head_parameters(model)}
    assert found.default_size == found.total_size - sum({**heads, **routers}.values())
    assert found.unreached == ()


def _head_parameters(model: Any) -> list[nn.Parameter]:
    modules = [getattr(model, key, None) for key in ("lm_head", "embed_out", "cls", "head", "decoder", "classifier")]
    modules += [getattr(model, "speak", None), getattr(getattr(model, "bert", None), "pooler", None)]
    return [p for m in modules if m is not None for p in m.parameters() if p.dim() == 2]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_called_site_computes_its_weight_and_nothing_else(name: str) -> None:
    model = tiny.build(name)
    for site in mapped(name).weights:
        if site.access == "call":
            module = model.get_submodule(site.owner)
            weight = module.get_parameter(site.parameter)
            x = torch.randn(3, 5, site.n_in)
            change = torch.randn(site.shape)
            with torch.no_grad():
                before = module(x)
                weight.add_(change.T if site.transposed else change)
                seen = module(x) - before
                weight.sub_(change.T if site.transposed else change)
            torch.testing.assert_close(seen, x @ change.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_default_weight_acts_through_a_listed_stream(name: str) -> None:
    """With all streams silenced, no default weight matters any more."""
    model, found = tiny.build(name), mapped(name)
    handles = [model.get_submodule(s.path).register_forward_hook(_silenced(s.output)) for s in found.streams]
    before = _logits(model, name)
    with torch.no_grad():
        for site in found.weights:
            if site.default:
                model.get_parameter(site.path).add_(0.1)
    assert torch.equal(_logits(model, name), before)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(_logits(model, name), before, atol=1e-2)


def _silenced(key: Any) -> Any:
    def silence(module: nn.Module, args: Any, out: Any) -> Any:
        if key is None:
            return torch.zeros_like(out)
        return tuple(torch.zeros_like(o) if i == key else o for i, o in enumerate(out))

    return silence


def _logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs(name)).logits


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_branch_input_is_where_the_site_says(name: str) -> None:
    model = tiny.build(name)
    for site in mapped(name).streams:
        seen: list[torch.Tensor] = []
        path = site.tap if site.input is None else site.path
        slot = 0 if site.input is None else site.input

        def keep(module: Any, args: Any, kwargs: Any, slot: Any = slot, seen: list[torch.Tensor] = seen) -> None:
            seen.append(kwargs[slot] if isinstance(slot, str) else args[slot])

        handle = model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
        _logits(model, name)
        handle.remove()
        assert seen[0].shape == (3, 7, site.width)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_looking_changes_nothing(name: str) -> None:
    model = tiny.build(name).train()
    model.get_submodule("").training = False  # an unusual mix of flags must come back as well
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    attributes = [{**vars(m)} for m in model.modules()]
    flags = [m.training for m in model.modules()]
    torch_seed, python_seed = torch.random.get_rng_state(), random.getstate()
    sites(model)
    assert flags == [m.training for m in model.modules()]
    assert [set(a) for a in attributes] == [set(vars(m)) for m in model.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch_seed, torch.random.get_rng_state())
    assert python_seed == random.getstate()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_map_survives_json(name: str) -> None:
    found = mapped(name)
    again = SiteMap.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert str(again) == str(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_half_precision_has_the_same_sites(name: str, dtype: torch.dtype) -> None:
    assert sites(tiny.build(name, dtype)) == mapped(name)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "bert", "qwen3_moe", "odd"])
def test_four_bit_has_the_same_sites_and_stays_as_it_was(name: str) -> None:
    layers = pytest.importorskip("bitsandbytes.nn")
    model = tiny.build(name)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and mapped(name).of("weight") and _default(mapped(name), path):
            layer = layers.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, quant_type="nf4"
            )
            layer.load_state_dict(module.state_dict())
            model.set_submodule(path, layer.to("cpu"))
    packed = {key: value.clone() for key, value in model.state_dict().items()}
    assert sites(model) == mapped(name)
    assert all(torch.equal(value, packed[key]) for key, value in model.state_dict().items())


def _default(found: SiteMap, owner: str) -> bool:
    return any(site.owner == owner and site.default for site in found.weights)


def test_the_table_collapses_equal_blocks() -> None:
    lines = str(mapped("llama")).splitlines()
    assert "  model.layers.{0..1}.self_attn.q_proj  attention.query   64 -> 64     x2" in lines
    assert "  model.layers.{0..1}.mlp           stream.mlp        64  input 0              x2" in lines
    assert lines[-1] == "87.8% of 83,968 matmul parameters adapted by default; 10,240 only when named"


class AnyWeight(WeightMethod):
    name = "any"


class AnyStream(StreamMethod):
    name = "anystream"


class AnyKeyValue(KeyValueMethod):
    name = "anykeyvalue"


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (None, 14),
        ("all", 14),
        ("attention.query", 2),
        ("attention.*", 8),
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("*.q_proj", 2),
        ("model.layers.0.*", 7),
        ("model.layers.1.mlp.up_proj", 1),
        ("model.layers.1.mlp.up_proj.weight", 1),
        (["mlp.down", "mlp.gate", "down_proj"], 4),
        ("head", 1),
        (["all", "lm_head"], 15),
        (lambda site: site.n_out == 32, 4),
    ],
)
def test_targets(targets: Any, count: int) -> None:
    found = mapped("llama")
    chosen = select(found, AnyWeight(), targets)
    assert len(chosen) == count
    assert list(chosen) == [site for site in found.weights if site in chosen]  # in order, none twice


def test_targets_keep_to_the_kind_of_the_method() -> None:
    assert {s.role for s in select(mapped("llama"), AnyStream())} == {"stream.attention", "stream.mlp"}
    assert {s.role for s in select(mapped("llama"), AnyStream(), "mlp")} == {"stream.mlp"}
    assert len(select(mapped("llama"), AnyKeyValue())) == 2


@pytest.mark.parametrize(
    ("method", "targets", "words"),
    [
        (AnyWeight(), "atention.*", ["no weight site of LlamaForCausalLM matches 'atention.*'", "did you mean"]),
        (AnyWeight(), ["q_proj", "q_porj"], ["'q_porj'; did you mean 'q_proj'?", "attention.query", "down_proj"]),
        (AnyWeight(), "proj", ["'proj'"]),
        (AnyWeight(), [], ["an empty list of targets"]),
        (AnyWeight(), lambda site: False, ["the predicate given as targets accepts none of the 16 weight sites"]),
        (AnyWeight(), [3], ["targets are strings or one predicate, not int: 3"]),
        (AnyStream(), "q_proj", ["no stream site", "stream.attention"]),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_names_what_exists(
    method: Any, targets: Any, words: list[str]
) -> None:
    with pytest.raises(AdapterError) as error:
        select(mapped("llama"), method, targets)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_without_the_kind_of_site_is_refused() -> None:
    found = sites(Plain(), example=torch.randn(2, 5, 8))
    with pytest.raises(AdapterError, match="Plain has no keyvalue or layer site, which anykeyvalue needs"):
        select(found, AnyKeyValue())


class Plain(nn.Module):
    """Not from transformers: a residual MLP in which one layer is never called, and one expert gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.second(torch.tanh(self.first(x)))
        return x + self.experts[1](x)


def test_any_module_with_an_example() -> None:
    model = Plain()
    with pytest.raises(AdapterError, match="pass a small example"):
        sites(model)
    found = sites(model, example=torch.randn(2, 5, 8))
    assert found == sites(model, example={"x": torch.randn(2, 5, 8)}) == sites(model, example=[torch.randn(2, 5, 8)])
    roles = {site.path: site.role for site in found.weights}
    assert (roles["first.weight"], roles["second.weight"]) == ("mlp.up", "mlp.down")
    assert roles["experts.0.0.weight"] == roles["experts.1.0.weight"] == "mlp.up"  # the first was not called
    assert [(left.path, left.size) for left in found.unreached] == [("spare.weight", 64)]
    assert found.streams[0].path == "second"


def test_a_forward_that_fails_leaves_the_model_and_says_why() -> None:
    model = Plain().train()
    with pytest.raises(AdapterError, match="failed with RuntimeError"):
        sites(model, example=torch.randn(2, 5, 9))
    assert all(m.training for m in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "bert"])
def test_an_attached_and_acting_adapter_changes_nothing(name: str) -> None:
    model = tiny.build(name)
    adapters.attach(model, "lora", rank=4)
    modules, classes = list(model.named_modules()), [type(m) for m in model.modules()]
    assert sites(model) == mapped(name)
    assert list(model.named_modules()) == modules
    assert [type(m) for m in model.modules()] == classes


def test_containers_of_adapters_are_not_sites() -> None:
    model = tiny.build("llama")
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            container = nn.ModuleDict({"fr": nn.Linear(4, 4)})
            container.is_adapter_container = True
            module.adapters = container
    assert sites(model) == mapped("llama")


def test_scores_plus_a_bias_made_from_earlier_values_are_no_branch() -> None:
    """MPNet shares one position bias among its layers, and adds it to the scores of each."""
    config = hf.MPNetConfig(
        vocab_size=160, hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=2
    )
    found = sites(hf.MPNetForMaskedLM(config).eval())
    assert [site.branch for site in found.streams] == ["attention", "mlp"] * 2
    assert Counter(site.role for site in found.weights)["attention.key"] == 2


def test_the_trace_is_linear_in_depth() -> None:
    config = hf.LlamaConfig(
        vocab_size=160, hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=30
    )
    model = hf.LlamaForCausalLM(config).eval()
    started = time.process_time()
    found = sites(model)
    assert len(found.weights) == 30 * 7 + 2
    assert time.process_time() - started < 3.0


EXPLAINED = {
    "model.layers.0.mlp.gate.weight": ["role router", "adapted only when named: chooses or weighs experts"],
    "*.1.mlp.experts.down_proj": ["4 experts", "role mlp.down", "rows of a batch: routed", "adapted by default"],
    "model.layers.0.self_attn": ["output 0, 64 wide", "an attention branch", "interface, 2 heads of 16, causal"],
    "model.layers.1.self_attn.q_proj": ["role attention.query", "access call", "model.layers.1.self_attn[0] returns"],
    "lm_head": ["role head", "the output embeddings"],
    "model.norm.weight": ["no site: it has less than two dimensions"],
}


@pytest.mark.parametrize("path", EXPLAINED)
def test_an_explanation_names_role_rule_and_default(path: str) -> None:
    said = adapters.explain(tiny.build("qwen3_moe"), path)
    assert all(word in said for word in EXPLAINED[path]), said


def test_what_cannot_be_explained_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(AdapterError, match=r"no parameter or module 'model.layers.0.self_atn'; did you mean"):
        adapters.explain(tiny.build("llama"), "model.layers.0.self_atn")
    with pytest.raises(AdapterError, match="holds no weight and is neither a stream nor an attention"):
        adapters.explain(tiny.build("llama"), "model.layers.0.mlp.act_fn")
