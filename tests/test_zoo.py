"""A zoo of adapters that stock PEFT wrote: each loads with PEFT's own outputs and goes back exactly, or is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import shake, shake_trained
from safetensors.torch import load_file, save_file
from test_interop_peft import by_peft, logits, refused, same

import adapters
from adapters._attach import tensors_of

peft = pytest.importorskip("peft")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(r=4, lora_alpha=6, **options)


# what is said of a folder: the model it is for, and PEFT's configuration
LOADS: dict[str, tuple[str, Callable[[], Any]]] = {
    "all linear layers": ("llama", lora(target_modules="all-linear")),
    "an expression": ("llama", lora(target_modules=r".*\.(q|down)_proj")),
    "one layer": ("llama", lora(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "all but one": ("llama", lora(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"])),
    "drawn otherwise": ("gpt2", lora(target_modules=["c_attn"], init_lora_weights="gaussian")),
    "patterns": ("llama", lora(target_modules=["q_proj", "up_proj"], rank_pattern={r"1\..*q_proj": 2, "up_proj": 7})),
    "alphas": ("llama", lora(target_modules=["q_proj", "up_proj"], alpha_pattern={"q_proj": 2.5}, use_rslora=True)),
    "dora": ("llama", lora(target_modules=["q_proj", "v_proj"], use_dora=True, rank_pattern={"v_proj": 2})),
    "biases": ("llama", lora(target_modules=["q_proj"], lora_bias=True)),
    "the base's biases": ("gpt2", lora(target_modules=["c_attn", "c_fc"], bias="lora_only")),
    "saved embeddings": ("llama", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "saved at both ends": ("llama", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "saved, tied": ("gemma2", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "saved norms": ("llama", lora(target_modules=["q_proj"], modules_to_save=["input_layernorm"])),
    "a saved head": ("bert_classifier", lora(target_modules=["query"], task_type="SEQ_CLS")),
    "embeddings": ("llama", lora(target_modules=["q_proj", "embed_tokens"])),
    "a head": ("llama", lora(target_modules=["q_proj", "lm_head"])),
    "tokens": ("llama", lora(target_modules=["q_proj"], trainable_token_indices=[7, 3])),
    "tokens, tied": ("gemma2", lora(target_modules=["q_proj"], trainable_token_indices=[7, 3, 50])),
    "tokens at both ends": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [3, 7]}),
    ),
    "experts": ("qwen3_moe", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "one stack of experts": ("qwen3_moe", lora(target_modules=[], target_parameters=EXPERTS[1:])),
    "ranks of experts": ("qwen3_moe", lora(target_parameters=EXPERTS, rank_pattern={"experts.down_proj": 2})),
    "a router": ("qwen3_moe", lora(target_parameters=["mlp.gate.weight"])),
    "ia3": ("llama", lambda: peft.IA3Config()),
    "ia3 by names": ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])),
    "prefix": ("llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prefix, grouped": ("qwen3", lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "prefix, projected": (
        "llama",
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=16
        ),
    ),
    "prefix and head": ("bert_classifier", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
}
# a model, PEFT's configuration, and the reason that must be given
REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "olora": ("llama", lora(target_modules=["q_proj"], init_lora_weights="olora"), "changes the weights of the base"),
    "pissa": ("llama", lora(target_modules=["q_proj"], init_lora_weights="pissa"), "changes the weights of the base"),
    "qalora": ("llama", lora(target_modules=["q_proj"], use_qalora=True), "use_qalora"),
    "alora": (
        "llama",
        lora(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
        "alora_invocation_tokens",
    ),
    "dora on a table": ("llama", lora(target_modules=["embed_tokens"], use_dora=True), "only a linear layer can have"),
    "tokens that differ": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [4, 9]}),
        "rows of other tokens in lm_head",
    ),
    "tokens beside a bias": (  # of the decoder, which PEFT drops
        "bert",
        lora(target_modules=["query"], trainable_token_indices=[9, 4]),
        "PEFT drops the bias of cls.predictions.decoder",
    ),
    "tokens at one of two tied ends": (
        "gemma2",
        lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 7]}),
        "at lm_head alone, which is tied to model.embed_tokens",
    ),
    "tokens in another order at the other tied end": (  # which PEFT then does not tie
        "gemma2",
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [7, 3]}),
        "rows of other tokens in lm_head",
    ),
    "every bias": ("gpt2", lora(target_modules=["c_attn"], bias="all"), "trained bias of transformer.h.0.attn.c_proj"),
    "tied by force": (
        "gemma2",
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "ensure_weight_tying",
    ),
    "prompt": ("llama", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    "vera": ("llama", lambda: peft.VeraConfig(target_modules=["q_proj"]), "VERA"),
    "loha": ("llama", lambda: peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
    "lokr": ("llama", lambda: peft.LoKrConfig(target_modules=["q_proj"]), "LOKR"),
    "oft": ("llama", lambda: peft.OFTConfig(target_modules=["q_proj"]), "OFT"),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
    "tokens alone": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[3, 5]), "TRAINABLE_TOKENS"),
}
# what PEFT's configurations gained, release by release (its config.py and tuners/*/config.py); 0.4.0 had the rest
OLDEST = {
    "auto_mapping", "base_model_name_or_path", "bias", "encoder_hidden_size", "fan_in_fan_out", "feedforward_modules",
    "inference_mode", "init_ia3_weights", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "modules_to_save", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "num_virtual_tokens", "peft_type", "prefix_projection", "r", "revision", "target_modules", "task_type", "token_dim",
}  # fmt: skip
SINCE: dict[str, set[str]] = {
    "0.4.0": set(),
    "0.6.0": {"alpha_pattern", "rank_pattern"},
    "0.7.0": {"loftq_config", "megatron_config", "megatron_core"},
    "0.8.2": {"use_rslora"},
    "0.9.0": {"use_dora"},
    "0.10.0": {"layer_replication"},
    "0.12.0": {"runtime_config"},
    "0.14.0": {"eva_config", "exclude_modules", "lora_bias"},
    "0.15.2": {"corda_config", "trainable_token_indices"},
    "0.16.0": {"qalora_group_size", "use_qalora"},
    "0.17.1": {"target_parameters"},
    "0.18.1": {"alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "peft_version"},
    "0.19.1": {"init_weights", "lora_ga_config", "use_bdlora"},
    "0.20.0": {"monteclora_config", "velora_config"},
    "0.21.0": {"kasa_config"},
}
RELEASES = list(SINCE)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("label", LOADS)
def test_pefts_folder_computes_the_same_and_goes_back_exactly(label: str, tmp_path: Path) -> None:
    name, config = LOADS[label]
    expected = by_peft(name, tmp_path / "theirs", config())
    model = tiny.build(name)
    adapters.load(model, tmp_path / "theirs", name="fr")
    same(logits(model), expected)
    assert (expected - logits(tiny.build(name))).norm() > 1e-2 * expected.norm()
    if label == "prefix and head":  # prefixes of encoders: many do not see them in PEFT, so none are written
        with pytest.raises(adapters.AdapterError, match="causal language models alone"):
            adapters.export_peft(model, "fr", tmp_path / "back")
        return
    adapters.export_peft(model, "fr", tmp_path / "back")
    back = logits(peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "back").eval())
    same(back, expected)
    assert torch.equal(back, expected) or label == "the base's biases"  # which went as differences in between
    again = tiny.build(name)
    adapters.load(again, tmp_path / "back", name="fr")
    ours, twice = tensors_of(model, "fr"), tensors_of(again, "fr")
    assert ours.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("label", LOADS)
def test_our_own_folder_of_it_is_exact(label: str, tmp_path: Path) -> None:
    name, config = LOADS[label]
    by_peft(name, tmp_path / "theirs", config())
    model, again = tiny.build(name), tiny.build(name)
    adapters.load(model, tmp_path / "theirs", name="fr")
    adapters.save(model, "fr", tmp_path / "ours")
    adapters.load(again, tmp_path / "ours", name="fr")
    assert torch.equal(logits(again), logits(model))
    assert adapters.adapters_of(again)["fr"].method == adapters.adapters_of(model)["fr"].method


@pytest.mark.parametrize("label", REFUSED)
def test_what_is_not_computed_here_is_refused_with_the_reason(label: str, tmp_path: Path) -> None:
    name, config, reason = REFUSED[label]
    by_peft(name, tmp_path, config())
    refused(name, tmp_path, reason)


def as_written_by(release: str, folder: Path) -> dict[str, Any]:
    """Cuts a configuration down to the fields that this release of PEFT knew."""
    known = OLDEST.union(*(SINCE[each] for each in RELEASES[: RELEASES.index(release) + 1]))
    config = {key: value for key, value in json.loads((folder / CONFIG).read_text()).items() if key in known}
    if "peft_version" in config:
        config["peft_version"] = release
    (folder / CONFIG).write_text(json.dumps(config))
    return config


NEEDS = {"patterns": "0.6.0", "alphas": "0.8.2", "dora": "0.9.0", "biases": "0.14.0", "tokens": "0.15.2"}
KEPT = ["an expression", *NEEDS, "the base's biases", "a saved head", "ia3", "prefix"]


@pytest.mark.parametrize("release", RELEASES)
def test_configurations_of_every_release_are_read(release: str, tmp_path: Path) -> None:
    for label in KEPT:
        if RELEASES.index(NEEDS.get(label, RELEASES[0])) > RELEASES.index(release):
            continue
        name, config = LOADS[label]
        expected = by_peft(name, tmp_path / label, config())
        as_written_by(release, tmp_path / label)
        model = tiny.build(name)
        adapters.load(model, tmp_path / label, name="fr")
        same(logits(model), expected)


@pytest.mark.parametrize("label", ["patterns", "biases", "a saved head", "ia3", "prefix", "experts", "tokens"])
def test_what_peft_pickled_is_read_as_data(label: str, tmp_path: Path) -> None:
    """`adapter_model.bin`, PEFT's file before 0.6: torch.save of the same names and tensors."""
    name, config = LOADS[label]
    model = peft.get_peft_model(tiny.build(name), config()).eval()
    shake_trained(model)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    expected, loaded = logits(model), tiny.build(name)
    report = adapters.load(loaded, tmp_path, name="fr")
    assert any("nothing of it was unpickled" in note for note in report.notes)
    same(logits(loaded), expected)
    assert adapters.inspect(tmp_path).files["adapter_model.bin"] > 1000
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(print))
    refused(name, tmp_path, "adapter_model.bin is a pickle outside a zip")
    (tmp_path / "adapter_model.bin").unlink()
    refused(name, tmp_path, "adapter_model.safetensors is missing, and so is adapter_model.bin")


def test_no_field_of_todays_configurations_is_missing_from_the_list() -> None:
    """Whoever adds to PEFT's configurations is met here first: a new field is read, or refused, on purpose."""
    made = (peft.LoraConfig(), peft.IA3Config(), peft.PrefixTuningConfig(num_virtual_tokens=1))
    known = OLDEST.union(*SINCE.values())
    assert {field for each in made for field in each.to_dict()} - {"loftq_config", "runtime_config"} <= known


def test_a_field_that_only_later_releases_know_is_refused_when_it_is_set(tmp_path: Path) -> None:
    by_peft("llama", tmp_path, lora(target_modules=["q_proj"])())
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "use_tomorrow": False, "tomorrow": None}))
    adapters.load(tiny.build("llama"), tmp_path, name="fr")
    (tmp_path / CONFIG).write_text(json.dumps({**config, "use_tomorrow": True}))
    refused("llama", tmp_path, "use_tomorrow")


@pytest.mark.parametrize("release", ["0.17.1", "0.18.1"])
def test_experts_as_peft_kept_them_before_it_knew_how_they_are_stored(release: str, tmp_path: Path) -> None:
    """Before 0.19, dW of a stack (experts, d1, d2) was einsum("o r e, e r i -> e i o", B, A) for every model."""
    name, rank, scale = "qwen3_moe", 4, 6 / 4
    by_peft(name, tmp_path, lora(target_parameters=EXPERTS)())
    held = load_file(tmp_path / WEIGHTS)
    model = tiny.build(name)
    changed = tiny.build(name)
    generator = torch.Generator().manual_seed(4)
    for layer, block in enumerate(changed.model.layers):
        for wrapped, parameter in ((".base_layer", block.mlp.experts.gate_up_proj), ("", block.mlp.experts.down_proj)):
            count, d1, d2 = parameter.shape
            a = 0.1 * torch.randn(rank * count, d1, generator=generator)
            b = 0.1 * torch.randn(d2, rank * count, generator=generator)
            key = f"base_model.model.model.layers.{layer}.mlp.experts{wrapped}"
            held |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            change = torch.einsum("ore,eri->eio", b.view(d2, rank, count), a.view(count, rank, d1))
            parameter.data += scale * change
    save_file(held, tmp_path / WEIGHTS)
    as_written_by(release, tmp_path)
    report = adapters.load(model, tmp_path, name="fr")
    assert any("read as those before 0.19" in note for note in report.notes) == (release == "0.17.1")
    same(logits(model), logits(changed))
    adapters.export_peft(model, "fr", tmp_path / "today")
    same(logits(peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "today").eval()), logits(changed))


def test_what_peft_takes_for_experts_is_not_written(tmp_path: Path) -> None:
    """DeepSeek's shared experts and dense layers have the names that its experts had before they were fused."""
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16}
    dims = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1}
    config = hf.DeepseekV3Config(
        **sizes, **heads, **dims, vocab_size=64, num_hidden_layers=2, first_k_dense_replace=1, num_experts_per_tok=2
    )
    model = hf.DeepseekV3ForCausalLM(config).eval()
    adapters.attach(model, "lora", name="fr", targets=["*.mlp.down_proj", "*shared_experts.down_proj"])
    shake(model, "fr")
    with pytest.raises(adapters.AdapterError, match=r"PEFT takes '.*down_proj' for the experts of this model"):
        adapters.export_peft(model, "fr", tmp_path / "theirs")
    assert "for the experts" in adapters.save(model, "fr", tmp_path / "ours").peft
    assert not adapters.check_for(tmp_path / "ours", "peft").works
    adapters.attach(model, "lora", name="de", targets=["attention.output", "mlp.gate_up"])
    shake(model, "de")
    adapters.export_peft(model, "de", tmp_path / "de")
    expected = logits_of(model)
    adapters.detach(model)
    same(logits_of(peft.PeftModel.from_pretrained(model, tmp_path / "de").eval()), expected)


def test_what_peft_would_rename_as_it_loads_is_not_written(tmp_path: Path) -> None:
    """transformers' pattern `mlp.shared_expert.` for old checkpoints of a type matches the new `mlp.shared_experts`."""
    from tests.matrix.build import build
    from tests.matrix.pairs import pairs

    model, _ = build(next(pair for pair in pairs() if (pair.type, pair.head) == ("laguna", "causal")))
    adapters.attach(model, "lora", name="fr", targets=["*shared_experts.down_proj"])
    with pytest.raises(adapters.AdapterError, match=r"PEFT renames model\.layers\.1\.mlp\.shared_experts\.down_proj"):
        adapters.export_peft(model, "fr", tmp_path / "fr")
    adapters.attach(model, "lora", name="de", targets=["attention.*"])
    adapters.export_peft(model, "de", tmp_path / "de")


def test_shared_experts_that_peft_leaves_alone_are_written(tmp_path: Path) -> None:
    """Qwen2-MoE's own type is none of those whose names PEFT takes for experts."""
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "shared_expert_intermediate_size": 24}
    config = hf.Qwen2MoeConfig(**sizes, **heads, vocab_size=64, num_hidden_layers=1, num_experts_per_tok=2)
    model = hf.Qwen2MoeForCausalLM(config).eval()
    adapters.attach(model, "lora", name="fr")
    shake(model, "fr")
    adapters.export_peft(model, "fr", tmp_path)
    expected = logits_of(model)
    adapters.detach(model)
    same(logits_of(peft.PeftModel.from_pretrained(model, tmp_path).eval()), expected)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(14).view(2, 7)).logits
    return found


def test_pefts_own_list_of_these_names_is_the_one_here() -> None:
    from peft.utils import transformers_weight_conversion as theirs

    from adapters._interop.peft_names import FUSED, UNFUSED

    mapped = theirs._MOE_TARGET_MODULE_MAPPING
    assert {name for each in mapped.values() for name in each} == set(UNFUSED)
    assert {name for each in mapped.values() for name in each.values()} == {"gate.weight", FUSED, "down_proj"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", "4"),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_alpha", True),
        ("lora_dropout", "x"),
        ("r", "4"),
        ("r", 4.0),
        ("use_rslora", "x"),
        ("rank_pattern", {"q_proj": "x"}),
        ("rank_pattern", [2]),
        ("alpha_pattern", {"q_proj": None}),
        ("modules_to_save", 4),
        ("modules_to_save", [None]),
        ("peft_version", 0),
        ("trainable_token_indices", "x"),
        ("trainable_token_indices", [7, -3]),
        ("trainable_token_indices", [7, 3.9]),
        ("trainable_token_indices", [7, True]),
        ("trainable_token_indices", [7, 7]),
        ("trainable_token_indices", {"embed_tokens": "37"}),
    ],
)
def test_values_of_other_types_are_refused_in_a_sentence(field: str, value: Any, tmp_path: Path) -> None:
    by_peft("llama", tmp_path, lora(target_modules=["q_proj"], trainable_token_indices=[3, 8])())
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, field: value}))
    refused("llama", tmp_path, f"{CONFIG} sets {field} to ")
    if field != "trainable_token_indices":
        for program in ("peft", "vllm", "llama.cpp", "mistralrs", "mlx"):
            with pytest.raises(adapters.DamagedAdapter):
                adapters.check_for(tmp_path, program)


def test_every_tensor_of_experts_and_tokens_is_accounted_for(tmp_path: Path) -> None:
    by_peft("qwen3_moe", tmp_path, lora(target_parameters=EXPERTS, trainable_token_indices=[3, 8])())
    whole = load_file(tmp_path / WEIGHTS)
    down, rows = (next(key for key in whole if end in key) for end in ("experts.lora_A", "trainable_tokens_delta"))
    without = {key: {k: t for k, t in whole.items() if k != key} for key in (down, rows)}
    for held, reason in (
        (without[down], "lacks .*experts.lora_A.weight, a tensor of .*down_proj"),
        (without[rows], "lacks the rows of"),
        ({**whole, down: whole[down][:-1].contiguous()}, "do not fit the parameter here: 4 matrices of 64 x 64"),
        ({**whole, rows: whole[rows][:-1].contiguous()}, "names 2 tokens"),
    ):
        save_file(held, tmp_path / WEIGHTS)
        refused("qwen3_moe", tmp_path, reason)
    save_file(whole, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    for change, reason in (
        ({"target_parameters": EXPERTS[:1]}, "do not fit|no tensor of this adapter"),
        ({"target_parameters": [*EXPERTS, "mlp.experts.bias"]}, "names the parameter mlp.experts.bias"),
        ({"trainable_token_indices": {"norm": [3, 8]}}, "rows of norm, which is no table"),
        ({"trainable_token_indices": None}, "trainable_tokens_delta, which is no tensor of this adapter"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
        refused("qwen3_moe", tmp_path, reason)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"method": "prefix", "length": 3}, "positions='shifted'"),
        ("llama", {"method": "prefix", "length": 3, "positions": "shifted", "targets": "*.1.*"}, "every attention"),
        ("bert", {"method": "prefix", "length": 3, "positions": "shifted"}, "causal language models alone"),
        ("qwen3_moe", {"method": "dora", "targets": "mlp.*"}, "LoRA alone"),
        ("qwen3_moe", {"method": "ia3"}, "read as a parameter"),
    ],
)
def test_what_peft_would_read_as_something_else_is_not_written(
    name: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = tiny.build(name)
    adapters.attach(model, options.pop("method"), name="fr", **options)
    shake(model, "fr")
    with pytest.raises(adapters.AdapterError, match=reason):
        adapters.export_peft(model, "fr", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_dropout_beside_experts_is_said_to_be_left_out(dropout: float, tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe")
    adapters.attach(model, "lora", name="fr", targets=["mlp.down", "attention.query"], dropout=dropout)
    shake(model, "fr")
    report = adapters.export_peft(model, "fr", tmp_path)
    assert any("no dropout beside target_parameters" in note for note in report.notes) == (dropout > 0)
    theirs = peft.PeftModel.from_pretrained(tiny.build("qwen3_moe"), tmp_path).eval()
    same(logits(theirs), logits(model))
    assert "another order" in adapters.save(model, "fr", tmp_path / "ours").peft
