"""AdapterHub's folders: read without unpickling, equal to their formulas written out by hand, else refused by name."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import adapterhub_golden as golden
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import adapters
from adapters._store.zipped import parse

STREAMS = {  # AdapterHub's names of the modules that hold its layers after attention and feed-forward
    "bert": ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output"),
    "bert_classifier": ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output"),
    "llama": ("model.layers.{}.attention_adapters", "model.layers.{}.output_adapters"),
    "gpt2": ("transformer.h.{}.attention_adapters", "transformer.h.{}.output_adapters"),
}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh}
LINEARS = {
    "bert": ("bert.encoder.layer.{}.", "attention.self.query", "attention.self.key", "attention.self.value",
             "intermediate.dense", "output.dense"),
    "llama": ("model.layers.{}.", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj",
              "mlp.up_proj"),
    "gpt2": ("transformer.h.{}.", "attn.c_attn", "attn.c_attn", "attn.c_attn", "mlp.c_fc", "mlp.c_proj"),
}  # fmt: skip
HOUSLBY = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 8, "non_linearity": "swish"}
CASES: dict[str, dict[str, Any]] = {
    "houlsby": HOUSLBY,
    "plain": {**HOUSLBY, "mh_adapter": False, "non_linearity": "gelu", "scaling": 2.5},
    "parallel": {**HOUSLBY, "non_linearity": "relu", "is_parallel": True, "scaling": 4.0},
    "pfeiffer": {**HOUSLBY, "mh_adapter": False, "non_linearity": "relu", "original_ln_before": True},
    "summed": {**HOUSLBY, "reduction_factor": 4, "original_ln_before": True, "scaling": "channel"},
    "learned": {**HOUSLBY, "output_adapter": False, "non_linearity": "tanh", "scaling": "channel", "leave_out": [1]},
    "uneven": {**HOUSLBY, "reduction_factor": {"0": 4, "default": 16}, "scaling": "learned"},
}


def options(**given: Any) -> dict[str, Any]:
    """All that AdapterHub 1.3.0 writes of a bottleneck's options."""
    defaults = {
        "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
        "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
        "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
        "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "original_ln_after": True,
        "original_ln_before": False, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001,
        "phm_layer": False, "phm_rank": 1, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
        "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
    }  # fmt: skip
    return {**defaults, **given}


def lora_options(**given: Any) -> dict[str, Any]:
    defaults = {
        "alpha": 8, "architecture": "lora", "attn_matrices": ["q", "v"], "composition_mode": "add", "dropout": 0.0,
        "dtype": None, "init_weights": "lora", "init_weights_seed": None, "intermediate_lora": False, "leave_out": [],
        "output_lora": False, "r": 8, "selfattn_lora": True, "use_dora": False, "use_gating": False, "vera_b": None,
        "vera_d": None,
    }  # fmt: skip
    return {**defaults, **given}


def write(folder: Path, own: Any, tensors: dict[str, Tensor], model: nn.Module, **more: Any) -> Path:
    """A folder as AdapterHub's `save_adapter` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    record = {
        "config": own, "hidden_size": config.hidden_size, "model_class": type(model).__name__, "name": "task",
        "model_name": "some/base", "model_type": config.model_type, "version": "adapters.1.3.0", **more,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(record))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 0.2 * torch.randn(shape, generator=generator)


def layers(
    own: dict[str, Any], name: str, model: nn.Module, shape: Any = draw
) -> dict[tuple[int, int], dict[str, Any]]:
    """The tensors of AdapterHub's layers by layer number, and 0 after attention or 1 after the feed-forward."""
    width, found = model.config.hidden_size, {}
    generator = torch.Generator().manual_seed(7)
    for number in range(model.config.num_hidden_layers):
        factors = own["reduction_factor"]
        factor = factors.get(str(number), factors["default"]) if isinstance(factors, dict) else factors
        inner = max(1, int(width // factor))
        for place, wanted in enumerate((own["mh_adapter"], own["output_adapter"])):
            if not wanted or number in own.get("leave_out", []):
                continue
            parts: dict[str, tuple[int, ...]] = {
                "adapter_down.0.weight": (inner, width), "adapter_down.0.bias": (inner,),
                "adapter_up.weight": (width, inner), "adapter_up.bias": (width,),
            }  # fmt: skip
            if isinstance(own.get("scaling"), str):
                parts["scaling"] = (width,) if own["scaling"] == "channel" else (1,)
            found[number, place] = {part: shape(size, generator) for part, size in parts.items()}
    return found


def keys(name: str, found: dict[tuple[int, int], dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{STREAMS[name][place].format(number)}.adapters.task.{part}": tensor
        for (number, place), parts in found.items()
        for part, tensor in parts.items()
    }


def change(h: Tensor, own: dict[str, Any], p: dict[str, Tensor]) -> Tensor:
    """s (U f(D h + c) + e)."""
    inner = ACTIVATIONS[own["non_linearity"]](h @ p["adapter_down.0.weight"].T + p["adapter_down.0.bias"])
    scaling = p.get("scaling", own.get("scaling", 1.0))
    return (inner @ p["adapter_up.weight"].T + p["adapter_up.bias"]) * scaling


def by_hand(name: str, own: dict[str, Any], found: dict[tuple[int, int], dict[str, Tensor]]) -> nn.Module:
    """The model with AdapterHub's layers written out: y a branch's output, r the stream it is added to."""
    model: nn.Module = tiny.build(name)
    for (number, place), p in found.items():
        put = _post_norm if name.startswith("bert") else _pre_norm
        put(model, name, number, place, own, p)
    return model


def _adapted(
    y: Tensor, r: Tensor, norm: Callable[[Tensor], Tensor], own: dict[str, Any], p: dict[str, Tensor]
) -> Tensor:
    h = r if own.get("is_parallel") else norm(y + r) if own.get("original_ln_before") else y
    return y + change(h, own, p)


def _post_norm(model: nn.Module, name: str, number: int, place: int, own: dict[str, Any], p: dict[str, Tensor]) -> None:
    output: Any = model.get_submodule(STREAMS[name][place].format(number))

    def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y = output.dense(hidden_states)
        made: Tensor = output.LayerNorm(_adapted(y, input_tensor, output.LayerNorm, own, p) + input_tensor)
        return made

    output.forward = forward


def _pre_norm(model: nn.Module, name: str, number: int, place: int, own: dict[str, Any], p: dict[str, Tensor]) -> None:
    layer: Any = model.get_submodule(STREAMS[name][place].format(number).rpartition(".")[0])
    norms = ("input_layernorm", "post_attention_layernorm") if name == "llama" else ("ln_1", "ln_2")
    branch = layer.mlp if place else (layer.self_attn if name == "llama" else layer.attn)
    stream: list[Tensor] = []
    getattr(layer, norms[place]).register_forward_pre_hook(lambda module, args: stream.append(args[0]))

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        y = out if isinstance(out, Tensor) else out[0]
        made = _adapted(y, stream.pop(), lambda x: x, own, p)
        return made if isinstance(out, Tensor) else (made, *out[1:])

    branch.register_forward_hook(hook)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.inputs(model)).logits
    return found


def same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_bottlenecks_equal_their_formula(name: str, case: str, tmp_path: Path) -> None:
    own, model = CASES[case], tiny.build(name)
    found = layers(own, name, model)
    folder = write(tmp_path / "hub", options(**own), keys(name, found), model)
    report = adapters.load(model, folder)
    expected = logits(by_hand(name, own, found))
    same(logits(model), expected)
    assert report.name == "task"
    assert "written by AdapterHub for some/base." in report.notes
    assert report.base.startswith("could not be checked")
    adapters.activate(model, None)
    assert torch.equal(logits(model), logits(tiny.build(name)))
    adapters.activate(model, "task")
    adapters.save(model, "task", tmp_path / "ours")
    again = tiny.build(name)
    adapters.load(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    adapters.swap(again, "task", folder)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("case", ["houlsby", "parallel", "pfeiffer"])
def test_rows_of_a_batch_and_recomputed_layers_read_the_same_stream(name: str, case: str, tmp_path: Path) -> None:
    """What is read from another module than the branch's is there in mixed batches and under checkpointing too."""
    own, model = CASES[case], tiny.build(name)
    folder = write(tmp_path, options(**own), keys(name, layers(own, name, model)), model)
    adapters.load(model, folder, name="a", trainable=True)
    alone = logits(model)
    adapters.load(model, folder, name="b", activate=False)
    with adapters.using(model, ["a", None, "b"]):
        mixed = logits(model)
    same(mixed[[0, 2]], alone[[0, 2]])
    same(mixed[1], logits(tiny.build(name))[1])
    adapters.detach(model, "b")
    found = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**tiny.inputs(model)).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for kept, again in zip(*found, strict=True):
        assert kept.norm() > 0
        same(again, kept)


def lora_tensors(
    name: str, own: dict[str, Any], shape: Any = draw
) -> Iterator[tuple[str, str, list[int], Tensor, Tensor]]:
    """Owner, key, which thirds of a fused projection, A and B (A is empty for IA3)."""
    before, *paths = LINEARS[name]
    model, generator = tiny.build(name), torch.Generator().manual_seed(9)
    letters = [letter for letter in "qkv" if letter in own["attn_matrices"]]
    chosen = [paths["qkv".index(letter)] for letter in letters]
    chosen += [paths[3]] * own["intermediate_lora"] + [paths[4]] * own["output_lora"]
    for number in range(tiny.LAYERS):
        for path in dict.fromkeys(chosen):
            owner = before.format(number) + path
            weight = model.get_submodule(owner).get_parameter("weight")
            n_in, n_out = weight.shape if name == "gpt2" else weight.shape[::-1]
            thirds = ["qkv".index(letter) for letter in letters] if path == "attn.c_attn" else []
            many, out = (len(thirds), n_out // 3 * len(thirds)) if thirds else (1, n_out)
            a, b = shape((own["r"] * many, n_in), generator), shape((out, own["r"]), generator)
            yield owner, f"{owner}.loras.task.lora_", thirds, a, b


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("matrices", ["qv", "qkv", "k"])
def test_lora_equals_its_formula(name: str, matrices: str, tmp_path: Path) -> None:
    own = lora_options(r=3, alpha=12, attn_matrices=list(matrices), intermediate_lora=True, output_lora=matrices == "k")
    tensors, expected, model = {}, tiny.build(name), tiny.build(name)
    for owner, key, thirds, a, b in lora_tensors(name, own):
        tensors |= {f"{key}A": a, f"{key}B": b}
        weight = expected.get_submodule(owner).get_parameter("weight")
        delta = torch.zeros(weight.shape[::-1] if name == "gpt2" else weight.shape)
        for i, third in enumerate(thirds):
            width = delta.shape[0] // 3
            delta[third * width : (third + 1) * width] = b[i * width : (i + 1) * width] @ a[i * 3 : i * 3 + 3]
        delta = delta if thirds else b @ a
        weight.data += 4.0 * (delta.T if name == "gpt2" else delta)
    report = adapters.load(model, write(tmp_path, own, tensors, model))
    same(logits(model), logits(expected))
    assert report.method == "lora"


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_ia3_equals_its_formula(name: str, tmp_path: Path) -> None:
    own = lora_options(r=1, alpha=1, attn_matrices=["k", "v"], composition_mode="scale", intermediate_lora=True)
    tensors, expected, model = {}, tiny.build(name), tiny.build(name)
    for owner, key, thirds, _, b in lora_tensors(name, own):
        tensors[f"{key}B"] = 1 + b
        module = expected.get_submodule(owner)
        scale = torch.cat([torch.ones(tiny.HIDDEN), 1 + b.view(-1)]) if thirds else 1 + b.view(-1)
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        weight.data *= scale if name == "gpt2" else scale.unsqueeze(1)
        if bias is not None:
            bias.data *= scale
    report = adapters.load(model, write(tmp_path, own, tensors, model))
    same(logits(model), logits(expected))
    assert report.method == "ia3"


@pytest.mark.parametrize(("name", "case"), golden.GOLDEN)
def test_what_adapterhub_computed(name: str, case: str, tmp_path: Path) -> None:
    """The numbers that the real AdapterHub printed for the same base and the same tensors."""
    model = golden.build(name)
    if case in golden.BOTTLENECKS:
        own = golden.BOTTLENECKS[case]
        shapes = keys(name, layers(own, name, model, lambda size, _: torch.empty(size)))
        written = options(**own)
    else:
        written, shapes = lora_options(**golden.LORAS[case]), {}
        before, *paths = LINEARS[name]
        letters = written["attn_matrices"]
        for number in range(2):
            for path in dict.fromkeys([*(paths["qkv".index(each)] for each in letters), paths[3]]):
                weight = model.get_submodule(before.format(number) + path).get_parameter("weight")
                n_in, n_out = weight.shape if name == "gpt2" else weight.shape[::-1]
                many, out = (2, n_out // 3 * 2) if path == "attn.c_attn" else (1, n_out)
                key = f"{before.format(number)}{path}.loras.task.lora_"
                if case == "lora":
                    shapes[f"{key}A"] = torch.empty(written["r"] * many, n_in)
                shapes[f"{key}B"] = torch.empty(out, written["r"])
    tensors = {key: golden.formula(key, tensor) for key, tensor in shapes.items()}
    adapters.load(model, write(tmp_path, written, tensors, model))
    found, expected = torch.tensor(golden.logits(model)), torch.tensor(golden.GOLDEN[name, case])
    assert (found - expected).abs().max() < 1e-5


def test_safetensors_are_read_as_well(tmp_path: Path) -> None:
    model = tiny.build("bert")
    found = layers(HOUSLBY, "bert", model)
    folder = write(tmp_path, options(**HOUSLBY), keys("bert", found), model)
    (folder / "pytorch_adapter.bin").unlink()
    save_file(keys("bert", found), folder / "adapter.safetensors")
    adapters.load(model, folder)
    same(logits(model), logits(by_hand("bert", HOUSLBY, found)))


def test_a_bare_model_and_one_with_a_head_share_their_adapters(tmp_path: Path) -> None:
    model = tiny.build("bert")
    found = layers(HOUSLBY, "bert", model)
    bare = {key.removeprefix("bert."): tensor for key, tensor in keys("bert", found).items()}
    adapters.load(model, write(tmp_path, options(**HOUSLBY), bare, model))
    same(logits(model), logits(by_hand("bert", HOUSLBY, found)))


def test_names_of_the_first_version_are_read(tmp_path: Path) -> None:
    model = tiny.build("bert")
    own = {**HOUSLBY, "mh_adapter": False, "non_linearity": "gelu_orig"}
    found = layers(own, "bert", model)
    old = {
        key.replace(".adapters.", ".layer_text_task_adapters."): tensor for key, tensor in keys("bert", found).items()
    }
    invertible = {"invertible_adapter": {"block_type": "nice", "reduction_factor": 2}}
    folder = write(tmp_path, options(**own, **invertible), old, model, type="text_task")
    record = json.loads((folder / "adapter_config.json").read_text())
    del record["version"]
    (folder / "adapter_config.json").write_text(json.dumps(record))
    adapters.load(model, folder)
    same(logits(model), logits(by_hand("bert", {**own, "non_linearity": "gelu"}, found)))


def test_lora_from_before_the_scale_was_mended(tmp_path: Path) -> None:
    own, model, expected = lora_options(r=3, alpha=12), tiny.build("bert"), tiny.build("bert")
    tensors = {}
    for owner, key, _, a, b in lora_tensors("bert", own):
        tensors |= {f"{key}A": a, f"{key}B": b}
        expected.get_submodule(owner).get_parameter("weight").data += b @ a
    report = adapters.load(model, write(tmp_path, own, tensors, model, version="adapters.1.0.1"))
    same(logits(model), logits(expected))
    assert any("alpha is 3 and not 12" in note for note in report.notes)


@pytest.mark.parametrize(
    ("own", "word"),
    [
        (options(**HOUSLBY, ln_before=True), "ln_before"),
        (options(**HOUSLBY, ln_after=True), "ln_after"),
        (options(**HOUSLBY, use_gating=True), "use_gating"),
        (options(**HOUSLBY, phm_layer=True), "phm_layer"),
        (options(**HOUSLBY, original_ln_after=False), "original_ln_after"),
        (options(**HOUSLBY, original_ln_before=True, residual_before_ln=False), "residual_before_ln"),
        (options(**HOUSLBY, residual_before_ln="post_add"), "residual_before_ln"),
        (options(**HOUSLBY, inv_adapter="nice"), "inv_adapter"),
        (options(**{**HOUSLBY, "non_linearity": "leakyrelu"}), "leakyrelu"),
        (options(**HOUSLBY, something_new=3), "something_new"),
        (lora_options(use_dora=True), "use_dora"),
        (lora_options(vera_d=0.1), "vera_d"),
        (lora_options(use_gating=True), "use_gating"),
        ({"architecture": "prefix_tuning", "prefix_length": 3}, "prefix tuning"),
        ({"architecture": "union", "configs": []}, "union"),
        ({"architecture": "reft"}, "ReFT"),
        ({"architecture": "mtl_lora"}, "multi-task"),
        ({"mh_adapter": True}, "lacks a field"),
        ("pfeiffer", "no options"),
    ],
)
def test_what_computes_something_else_is_refused_by_name(own: Any, word: str, tmp_path: Path) -> None:
    model = tiny.build("bert")
    folder = write(tmp_path, own, keys("bert", layers(HOUSLBY, "bert", model)), model)
    with pytest.raises(adapters.AdapterError, match=word):
        adapters.load(model, folder)
    assert torch.equal(logits(model), logits(tiny.build("bert")))


def test_tensors_must_be_all_and_nothing_more(tmp_path: Path) -> None:
    model = tiny.build("bert")
    whole = keys("bert", layers(HOUSLBY, "bert", model))
    layer = "bert.encoder.layer.1.output"
    without = {key: tensor for key, tensor in whole.items() if not key.startswith(layer)}
    part = {key: tensor for key, tensor in whole.items() if not key.endswith(f"{layer}.adapters.task.adapter_up.bias")}
    for tensors, word in (
        (without, "lacks the tensors of bert.encoder.layer.1.output"),
        (part, "lacks adapter_up.bias"),
        ({**whole, "bert.pooler.weight": torch.ones(2)}, "holds bert.pooler.weight"),
        ({**whole, f"{layer}.adapters.task.gate.weight": torch.ones(2)}, "holds gate.weight"),
        ({**whole, f"{layer}.adapters.task.adapter_up.bias": torch.ones(3)}, "has the shape"),
        ({**whole, f"{layer}.adapters.task.adapter_up.bias": torch.full((64,), torch.nan)}, "not finite"),
        ({key.replace("layer.1", "layer.7"): tensor for key, tensor in whole.items()}, "no module"),
        ({key: tensor for key, tensor in whole.items() if "attention" not in key}, "speaks of"),
    ):
        with pytest.raises(adapters.AdapterError, match=word):
            adapters.load(model, write(tmp_path, options(**HOUSLBY), tensors, model))
    own = {**HOUSLBY, "leave_out": [1]}
    with pytest.raises(adapters.DamagedAdapter, match=r"holds tensors of bert\.encoder\.layer\.1"):
        adapters.load(model, write(tmp_path, options(**own), whole, model))


def test_lora_must_have_what_its_options_name(tmp_path: Path) -> None:
    model, own = tiny.build("bert"), lora_options(r=3, intermediate_lora=True)
    whole = {f"{key}{part}": t for _, key, _, a, b in lora_tensors("bert", own) for part, t in (("A", a), ("B", b))}
    for tensors, word in (
        ({key: tensor for key, tensor in whole.items() if "value" not in key}, r"changes \['q'\] of attentions"),
        ({key: tensor for key, tensor in whole.items() if "intermediate" not in key}, "other weights of feed-forwards"),
        ({key: tensor for key, tensor in whole.items() if not key.endswith("lora_A")}, "lacks lora_A"),
        ({key: tensor for key, tensor in whole.items() if "layer.1" not in key}, "lacks the tensors"),
        ({**whole, "bert.encoder.layer.0.output.LayerNorm.loras.task.lora_A": torch.ones(3, 64)}, "no linear layer"),
    ):
        with pytest.raises(adapters.AdapterError, match=word):
            adapters.load(model, write(tmp_path, own, tensors, model))


@pytest.mark.parametrize(
    "odd", [{"r": "3"}, {"alpha": float("nan")}, {"r": 0}, {"leave_out": "all"}, {"attn_matrices": 3}, {"dropout": 2}]
)
def test_options_of_another_type_are_refused(odd: dict[str, Any], tmp_path: Path) -> None:
    model, own = tiny.build("bert"), lora_options(r=3)
    tensors = {f"{key}{part}": t for _, key, _, a, b in lora_tensors("bert", own) for part, t in (("A", a), ("B", b))}
    with pytest.raises(adapters.AdapterError):
        adapters.load(model, write(tmp_path, {**own, **odd}, tensors, model))


def test_another_type_of_model_is_refused(tmp_path: Path) -> None:
    model = tiny.build("bert")
    folder = write(
        tmp_path, options(**HOUSLBY), keys("bert", layers(HOUSLBY, "bert", model)), model, model_type="albert"
    )
    with pytest.raises(adapters.AdapterError, match="of type 'albert', and this one is 'bert'"):
        adapters.load(model, folder)


def test_a_fused_projection_without_a_bias_is_refused(tmp_path: Path) -> None:
    """AdapterHub gives it a random one, which changes the base and is not saved."""
    model = tiny.build("modernbert")
    folder = write(tmp_path, options(**HOUSLBY), {"x": torch.ones(1)}, model)
    with pytest.raises(adapters.AdapterError, match="at random"):
        adapters.load(model, folder)


def test_a_base_with_adapters_of_its_own_is_refused(tmp_path: Path) -> None:
    """AdapterHub turns them off (seen: X-MOD's logits move by 0.15 of their norm before any adapter is added)."""
    sizes = {**tiny._BERT, "languages": ["en_XX"], "default_language": "en_XX"}
    model = hf.XmodForMaskedLM(hf.XmodConfig(**sizes)).eval()
    folder = write(tmp_path, lora_options(), {"x": torch.ones(1)}, model)
    with pytest.raises(adapters.AdapterError, match="adapter_modules off"):
        adapters.load(model, folder)


def test_hooks_see_the_modules_that_the_interface_names(tmp_path: Path) -> None:
    """Where AdapterHub has no port, its layers read what its hooks are given; Gemma's branch ends in a norm."""
    model, name = tiny.build("gemma2"), "llama"
    own = {**HOUSLBY, "non_linearity": "tanh"}
    found = layers(own, name, model)
    folder = write(tmp_path, options(**own), keys(name, found), model)
    with pytest.raises(adapters.AdapterError, match="scaled or normalised"):
        adapters.load(model, folder)
    interface = {
        "layer_self_attn": "self_attn", "attn_o_proj": "o_proj", "layer_output_proj": "mlp.down_proj",
        "adapter_methods": ["bottleneck"],
    }  # fmt: skip
    (folder / "adapter_interface.json").write_text(json.dumps({"interface": interface}))
    adapters.load(model, folder)
    expected = tiny.build("gemma2")
    for (number, place), p in found.items():
        layer: Any = expected.model.layers[number]
        hooked = layer.mlp.down_proj if place else layer.self_attn.o_proj
        hooked.register_forward_hook(lambda module, args, y, p=p: y + change(y, own, p))
    same(logits(model), logits(expected))
    (folder / "adapter_interface.json").write_text(json.dumps({"interface": {**interface, "attn_o_proj": "q_proj"}}))
    with pytest.raises(adapters.AdapterError, match="does not return"):
        adapters.load(tiny.build("gemma2"), folder)


def head(folder: Path, tensors: dict[str, Tensor], **more: Any) -> None:
    labels = {"low": 0, "middle": 1, "high": 2}
    record = {
        "config": None, "label2id": labels, "model_class": "BertForSequenceClassification", "name": None,
        "num_labels": 3, **more,
    }  # fmt: skip
    (folder / "head_config.json").write_text(json.dumps(record))
    torch.save(tensors, folder / "pytorch_model_head.bin")


def test_a_linear_head_is_taken_and_another_told_of(tmp_path: Path) -> None:
    model, name = tiny.build("bert_classifier"), "bert_classifier"
    found = layers(HOUSLBY, name, model)
    folder = write(tmp_path, options(**HOUSLBY), keys(name, found), model)
    generator = torch.Generator().manual_seed(3)
    trained = {"classifier.weight": draw((3, 64), generator), "classifier.bias": draw((3,), generator)}
    head(folder, trained)
    report = adapters.load(model, folder)
    expected = by_hand(name, HOUSLBY, found)
    expected.get_submodule("classifier").load_state_dict({key[11:]: tensor for key, tensor in trained.items()})
    same(logits(model), logits(expected))
    assert model.config.id2label == {0: "low", 1: "middle", 2: "high"}
    assert not any("left out" in note for note in report.notes)
    plain = logits(by_hand(name, HOUSLBY, found))
    for tensors, more in (
        ({"classifier.weight": torch.ones(5, 64), "classifier.bias": torch.ones(5)}, {"num_labels": 5}),
        ({**trained, "dense.weight": torch.ones(2)}, {}),
        (trained, {"model_class": "RobertaForSequenceClassification"}),
        ({"heads.task.1.weight": torch.ones(3, 64)}, {"config": {"head_type": "classification"}}),
    ):
        head(folder, tensors, **more)
        model = tiny.build(name)
        assert any("head" in note and "left out" in note for note in adapters.load(model, folder).notes)
        same(logits(model), plain)


def test_a_head_that_is_the_models_own_is_nothing_to_tell(tmp_path: Path) -> None:
    model = tiny.build("bert")
    folder = write(tmp_path, options(**HOUSLBY), keys("bert", layers(HOUSLBY, "bert", model)), model)
    head(folder, {key: value for key, value in model.state_dict().items() if not key.startswith("bert.")})
    assert not any("head" in note for note in adapters.load(model, folder).notes)


def test_inspect_and_others_say_what_it_is(tmp_path: Path) -> None:
    model = tiny.build("bert")
    folder = write(tmp_path, options(**HOUSLBY), keys("bert", layers(HOUSLBY, "bert", model)), model)
    info = adapters.inspect(folder)
    assert (info.method, info.name, info.base["name"], info.verified) == (
        "AdapterHub bottleneck", "task", "some/base", False,
    )  # fmt: skip
    assert "pytorch_adapter.bin" in info.files
    assert "reduction_factor=8" in str(info)
    with pytest.raises(adapters.AdapterError, match="written by AdapterHub"):
        adapters.read(folder)
    with pytest.raises(adapters.AdapterError, match="written by AdapterHub"):
        adapters.check_for(folder, "peft")
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(adapters.DamagedAdapter, match=r"neither adapter\.safetensors nor pytorch_adapter\.bin"):
        adapters.inspect(folder)


# --- attacks on the file of tensors ---


def archive(path: Path, program: bytes, members: dict[str, bytes] | None = None, **options: Any) -> bytes:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("top/data.pkl", program)
        for name, content in (members or {}).items():
            file.writestr(f"top/{name}", content)
    return path.read_bytes()


def described(
    storage: tuple[Any, ...] = ("storage", "torch FloatStorage", "0", "cpu", 4),
    offset: int = 0,
    shape: tuple[int, ...] = (2, 2),
    strides: tuple[int, ...] = (2, 1),
    names: tuple[str, ...] = ("x",),
) -> bytes:
    """The program of a dictionary of tensors, written opcode by opcode."""

    def put(value: Any) -> bytes:
        if isinstance(value, tuple):
            return b"(" + b"".join(map(put, value)) + b"t"
        if isinstance(value, str) and value.startswith("torch "):
            return f"c{value.replace(' ', chr(10))}\n".encode()
        return pickle.dumps(value, protocol=2)[2:-1] if not isinstance(value, str) else text(value)

    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + put(storage) + b"Q"
    tensor += put(offset) + put(shape) + put(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}(" + b"".join(text(name) + tensor for name in names) + b"u."


DATA = {"data/0": torch.arange(4.0).numpy().tobytes()}
system = b"\x80\x02cposix\nsystem\n(X\x04\x00\x00\x00true" + b"tR."


def test_a_program_written_by_hand_is_read(tmp_path: Path) -> None:
    """So that what the attacks below change is what is refused."""
    found = parse(archive(tmp_path / "x.bin", described(), DATA), "x.bin")
    assert torch.equal(found["x"], torch.arange(4.0).view(2, 2))
    turned = parse(archive(tmp_path / "x.bin", described(strides=(1, 2)), DATA), "x.bin")
    assert torch.equal(turned["x"], torch.arange(4.0).view(2, 2).T)


def test_kinds_of_tensors_that_torch_saves_are_read(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tensors: dict[str, Tensor] = {
        str(dtype): torch.ones(2, 3).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    tensors |= {"turned": torch.randn(3, 4).T, "part": torch.randn(6, 4)[2:4], "one": shared, "other": shared}
    tensors |= {"parameter": nn.Parameter(torch.randn(3)), "scalar": torch.tensor(2.0)}
    torch.save(tensors, tmp_path / "x.bin")
    found = parse((tmp_path / "x.bin").read_bytes(), "x.bin")
    assert list(found) == list(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


class Runs:
    """Would write a file as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open, mode="w"), (str(self.path),)


class Built:
    def __init__(self) -> None:
        self.field = 1


@pytest.mark.parametrize(
    ("program", "word"),
    [
        (system, "posix.system"),
        (b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "builtins.eval"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "_rebuild_tensor_v2 with something else"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.", "OrderedDict with something else"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}b.", "BUILD"),
        (b"\x80\x02(iposix\nsystem\n.", "INST"),
        (b"\x80\x02(cposix\nsystem\no.", "posix.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "protocol 4"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02X\x01\x00\x00\x00xQ.", "storage from outside"),
        (b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".", "one dictionary"),
        (b"\x80\x02" + b"N\x85" + b"\x85" * 50_000 + b".", "one dictionary"),
        (b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b".", "one dictionary"),
        (b"\x80\x02}X\x01\x00\x00\x00x)" + b"q\x00h\x00\x86" * 60 + b"s.", "no tensor"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00s.", "no tensor"),
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "no text"),
        (b"\x80\x02}K\x01K\x01s.", "no text"),
        (b"\x80\x02R.", "not put down"),
        (b"\x80\x02t.", "not put down"),
        (b"\x80\x02h\x05.", "not remembered"),
        (b"\x80\x02N}s.", "not put down"),
        (b"\x80\x02}", "truncated"),
        (b"\x80\x02X\xff\xff\xff\x7fx.", "truncated"),
        (b"", "truncated"),
        (b"\x80\x02.", "one dictionary"),
        (described(storage=("storage", "torch FloatStorage", "0", "cpu", 3)), "another size"),
        (described(storage=("storage", "torch FloatStorage", "0", "cpu", 1 << 50)), "another size"),
        (described(storage=("storage", "torch DoubleStorage", "0", "cpu", 4)), "another size"),
        (described(storage=("storage", "torch FloatStorage", "1", "cpu", 4)), "lacks the storage"),
        (described(storage=("storage", "torch FloatStorage", "../0", "cpu", 4)), "storage from outside"),
        (described(storage=("module", "torch FloatStorage", "0", "cpu", 4)), "storage from outside"),
        (described(storage=("storage", "torch QInt8Storage", "0", "cpu", 4)), "QInt8Storage"),
        (described(offset=-1), "something else than a tensor"),
        (described(offset=1), "beyond its storage"),
        (described(strides=(-2, 1)), "something else than a tensor"),
        (described(strides=(0, 0)), "lie over each other"),
        (described(strides=(1, 1)), "lie over each other"),
        (described(strides=(3, 1)), "beyond its storage"),
        (described(shape=(2,)), "something else than a tensor"),
        (described(shape=(1 << 40, 1 << 40), strides=(1 << 40, 1)), "lie over each other"),
        (described(shape=(1 << 70, 1)), "something else than a tensor"),
        (described(shape=(0, 1 << 40)), "empty"),
        (described(shape=(1,) * 17, strides=(1,) * 17), "something else than a tensor"),
        (described(names=("x", "x")), "twice"),
    ],
)  # fmt: skip
def test_attacks_on_the_program_are_refused(program: bytes, word: str, tmp_path: Path) -> None:
    with pytest.raises(adapters.DamagedAdapter, match=word) as caught:
        parse(archive(tmp_path / "x.bin", program, DATA), "x.bin")
    assert str(caught.value).count("x.bin") == 1
    assert len(str(caught.value)) < 250


def test_one_storage_seen_many_times_is_refused(tmp_path: Path) -> None:
    storage = ("storage", "torch FloatStorage", "0", "cpu", 5000)
    program = described(storage=storage, shape=(5000,), strides=(1,), names=tuple(map(str, range(100))))
    with pytest.raises(adapters.DamagedAdapter, match="larger than the file"):
        parse(archive(tmp_path / "x.bin", program, {"data/0": bytes(20_000)}), "x.bin")


def test_nothing_runs(tmp_path: Path) -> None:
    for value in (Runs(tmp_path / "ran"), {"x": Runs(tmp_path / "ran")}, {"x": Built()}, [torch.ones(1)]):
        torch.save(value, tmp_path / "x.bin")
        with pytest.raises(adapters.DamagedAdapter, match="nothing of it was executed"):
            parse((tmp_path / "x.bin").read_bytes(), "x.bin")
    torch.save(tiny.build("bert").state_dict(), tmp_path / "x.bin")  # its _metadata is put on by BUILD
    with pytest.raises(adapters.DamagedAdapter, match="BUILD"):
        parse((tmp_path / "x.bin").read_bytes(), "x.bin")
    assert not (tmp_path / "ran").exists()


def test_attacks_on_the_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    whole = archive(path, described(), DATA)
    for cut in range(0, len(whole), 7):
        with pytest.raises(adapters.DamagedAdapter):
            parse(whole[:cut], "x.bin")
    for at in range(0, len(whole), 3):  # a flipped byte is noticed, or lies where it does not matter
        broken = whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]
        try:
            found = parse(broken, "x.bin")
        except adapters.DamagedAdapter:
            continue
        assert torch.equal(found["x"], torch.arange(4.0).view(2, 2))
    with pytest.raises(adapters.DamagedAdapter, match="compressed"):
        parse(archive(path, described(), DATA, compression=zipfile.ZIP_DEFLATED), "x.bin")
    with pytest.raises(adapters.DamagedAdapter, match="byte order"):
        parse(archive(path, described(), {**DATA, "byteorder": b"big"}), "x.bin")
    with pytest.raises(adapters.DamagedAdapter, match=r"no data\.pkl"):
        parse(archive(path, b"", {}).replace(b"data.pkl", b"data.pkx"), "x.bin")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("top/data.pkl", described())
    with pytest.raises(adapters.DamagedAdapter, match="twice"):
        parse(path.read_bytes(), "x.bin")


def test_members_may_not_lie_over_each_other(tmp_path: Path) -> None:
    whole = bytearray(archive(tmp_path / "x.bin", described(), {**DATA, "data/1": bytes(16)}))
    with zipfile.ZipFile(tmp_path / "x.bin") as file:
        entries = [info.header_offset for info in file.infolist()]
    at = whole.rfind(entries[2].to_bytes(4, "little"))  # in the directory at the end
    whole[at : at + 4] = entries[1].to_bytes(4, "little")
    with pytest.raises(adapters.DamagedAdapter, match="lies over another"):
        parse(bytes(whole), "x.bin")


def test_the_old_format_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(adapters.DamagedAdapter, match=r"before 1\.6"):
        parse((tmp_path / "x.bin").read_bytes(), "x.bin")
