"""Adapter folders of mlx-lm: against its formulas by hand and, where it is installed, against its outputs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers as hf
from laws import relative, shake
from torch import Tensor
from typer.testing import CliRunner

import adapters
from adapters._attach import adapters_of, tensors_of
from adapters._mlx import adapter as exporting
from adapters._mlx.layout import LAYERS
from adapters.cli import app

PATTERNS: dict[str, Any] = {"rank": 4, "rank_pattern": {"*.1.*": 2}, "alpha_pattern": {"*.1.*": 7.0}}


def adapted(method: str = "lora", model: Any = None, **options: Any) -> Any:
    model = model or tiny.build("llama")
    adapters.attach(model, method, name="fr", **options)
    shake(model, "fr")
    return model


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(folder / "adapters.safetensors")


def weight_of(model: Any, path: str) -> Tensor:
    module = model.get_submodule(path)
    w: Tensor = module.weight.detach().clone()
    return w.T if type(module).__name__ == "Conv1D" else w


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    ("method", "options", "kept"),
    [
        ("lora", {"rank": 3, "alpha": 5.0}, True),
        ("lora", {"rank": 4, "alpha": 2.0, "rslora": True}, True),
        ("lora", PATTERNS, False),
        ("dora", {"rank": 3, "alpha": 5.0}, True),
        ("dora", PATTERNS | {"rslora": True}, False),
    ],
    ids=["plain", "rslora", "patterns", "dora", "dora-patterns"],
)
def test_a_weight_becomes_what_it_became(
    name: str, method: str, options: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    """x becomes W x + scale ((x A) B), and with DoRA m / ||W + scale (A B)^T|| times that, by row."""
    model = adapted(method, tiny.build(name), **options)
    report = adapters.export_mlx(model, "fr", tmp_path / "fr")
    config, held = read(tmp_path / "fr")
    ours, theirs = LAYERS[model.config.model_type]
    rank, scale = (config["lora_parameters"][key] for key in ("rank", "scale"))
    owners = [site.owner for site in adapters_of(model)["fr"].sites]
    before = {path: weight_of(model, path) for path in owners}
    adapters.merge(model, "fr")
    leaves = ("lora_a", "lora_b", "m") if method == "dora" else ("lora_a", "lora_b")
    moved = {path: path.replace(ours, theirs) for path in owners}
    assert set(held) == {f"{path}.{leaf}" for path in moved.values() for leaf in leaves}
    for path, w in before.items():
        found = {leaf: held[f"{moved[path]}.{leaf}"] for leaf in leaves}
        assert found["lora_a"].shape == (w.shape[1], rank)
        assert found["lora_b"].shape == (rank, w.shape[0])
        x = torch.randn(5, w.shape[1])
        y = x @ w.T + scale * ((x @ found["lora_a"]) @ found["lora_b"])
        if "m" in found:
            y = found["m"] / torch.linalg.norm(w + (scale * found["lora_b"].T) @ found["lora_a"].T, dim=1) * y
        torch.testing.assert_close(y, x @ weight_of(model, path).T, rtol=1e-4, atol=1e-5)
        assert relative(x @ w.T, y) > 0.01
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    assert config["fine_tune_type"] == method
    assert (report.sites, report.layers, report.rank, report.scale) == (len(owners), tiny.LAYERS, rank, scale)
    assert not any("4 bits" in note for note in report.notes)
    assert report.bytes == (tmp_path / "fr" / "adapters.safetensors").stat().st_size
    assert any("another scale" in note for note in report.notes) != kept
    assert any("filled up with zeros to 4" in note for note in report.notes) != kept


@pytest.mark.parametrize(
    ("targets", "last", "keys"),
    [
        ("attention.*", 2, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]),
        (["*.1.*.up_proj*", "*.1.*.q_proj*"], 1, ["self_attn.q_proj", "mlp.up_proj"]),
        ("*.0.*.up_proj*", 2, ["model.layers.0.mlp.up_proj"]),
        (
            ["*.up_proj*", "*.1.*.q_proj*"],
            2,
            ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
        ),
    ],
    ids=["all", "last", "first", "unlike"],
)
def test_keys_name_what_is_adapted_and_nothing_else(targets: Any, last: int, keys: list[str], tmp_path: Path) -> None:
    """Within a layer where the last ones are alike, and from the root where they are not."""
    report = adapters.export_mlx(adapted(rank=2, targets=targets), "fr", tmp_path / "fr")
    config, held = read(tmp_path / "fr")
    assert (config["num_layers"], config["lora_parameters"]["keys"]) == (last, keys)
    whole = {key.rpartition(".")[0] for key in held}
    assert {path for path in whole if path in keys or path.split(".", 3)[3] in keys} == whole
    assert any("from the model's root" in note for note in report.notes) == keys[0].startswith("model.")


def test_a_scale_of_0_adds_nothing(tmp_path: Path) -> None:
    report = adapters.export_mlx(adapted(rank=2, alpha=0.0), "fr", tmp_path / "fr")
    _, held = read(tmp_path / "fr")
    assert report.scale == 1
    assert not any(tensor.any() for name, tensor in held.items() if name.endswith("lora_b"))
    assert all(tensor.any() for name, tensor in held.items() if name.endswith("lora_a"))


def test_tensors_in_16_bits_are_written_as_what_they_are(tmp_path: Path) -> None:
    model = tiny.build("llama", torch.bfloat16)
    adapters.attach(model, "lora", name="fr", rank=2, dtype=torch.bfloat16)
    shake(model, "fr")
    adapters.export_mlx(model, "fr", tmp_path / "fr")
    _, held = read(tmp_path / "fr")
    a = tensors_of(model, "fr")["model.layers.0.self_attn.q_proj.weight:a"]
    assert a.dtype == torch.bfloat16
    assert torch.equal(held["model.layers.0.self_attn.q_proj.lora_a"], a.float().T)


@pytest.mark.parametrize("method", ["qlora", "lora", "dora"])
def test_an_adapter_of_a_base_in_4_bits_says_so(method: str, tmp_path: Path) -> None:
    model = tiny.build("llama")
    adapters.quantize(model)
    report = adapters.export_mlx(adapted(method, model, rank=2), "fr", tmp_path / "fr")
    assert any("the base here is in 4 bits" in note for note in report.notes)


def emptied(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
        tensors_of(model, "fr")["model.layers.1.mlp.up_proj.weight:b"][3] = 0


def damaged(model: Any) -> None:
    with torch.no_grad():
        tensors_of(model, "fr")["model.layers.1.mlp.up_proj.weight:b"][3, 1] = math.nan


def unchanged(model: Any) -> None:
    pass


REFUSED: list[tuple[str, dict[str, Any], Callable[[Any], None], str]] = [
    ("llama", {"method": "bottleneck"}, unchanged, r"are LoRA and DoRA, and 'fr' is 'bottleneck': merge it"),
    ("llama", {"method": "ia3"}, unchanged, r"'fr' is 'ia3'"),
    ("llama", {"bias": True}, unchanged, "trains biases"),
    ("llama", {"tokens": [3, 9]}, unchanged, "holds rows of tokens"),
    ("bert_classifier", {}, unchanged, "holds a head"),
    ("llama", {"targets": ["*embed_tokens*"]}, unchanged, r"embed_tokens\.weight, which is no linear layer of its own"),
    ("qwen3_moe", {}, unchanged, r"mlp\.experts\.\w+, which is no linear layer of its own"),
    ("llama", {"targets": ["lm_head"]}, unchanged, r"lm_head\.weight is in none of the layers, model\.layers\.\*"),
    ("odd", {}, unchanged, r"of a 'odd\w*' model is not known here, only for cohere, .*starcoder2: merge"),
    ("llama", {"method": "dora"}, emptied, r"1\.mlp\.up_proj\.weight has a row of zeros, by whose length"),
    ("llama", {}, damaged, r"1\.mlp\.up_proj\.weight:b holds values that are not finite"),
]


@pytest.mark.parametrize(("name", "options", "change", "sentence"), REFUSED)
def test_what_mlx_lm_cannot_hold_is_refused(
    name: str, options: dict[str, Any], change: Callable[[Any], None], sentence: str, tmp_path: Path
) -> None:
    model = adapted(model=tiny.build(name), **options)
    change(model)
    with pytest.raises(adapters.AdapterError, match=sentence):
        adapters.export_mlx(model, "fr", tmp_path / "fr")
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_attached_and_folders_that_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(adapters.AdapterError, match=r"no adapter 'fx' is attached; did you mean 'fr'\?"):
        adapters.export_mlx(adapted(rank=2), "fx", tmp_path / "fr")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(adapters.AdapterError, match="exists already: give a new folder, or an empty one"):
        adapters.export_mlx(adapted(rank=2), "fr", tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    adapters.export_mlx(adapted(rank=2), "fr", tmp_path / "empty")
    read(tmp_path / "empty")


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(rank=2)

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == "adapters.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.export_mlx(model, "fr", tmp_path / "fr")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("leaf", ["lora_a", "lora_b", "m"])
def test_a_folder_that_does_not_read_back_is_not_kept(
    leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("dora", rank=2)
    inner = safetensors.torch.save

    def wrong(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
        key = f"model.layers.1.self_attn.k_proj.{leaf}"
        return inner({**tensors, key: tensors[key] * 1.001}, metadata)

    monkeypatch.setattr(safetensors.torch, "save", wrong)
    with pytest.raises(adapters.AdapterError, match=r"layers\.1\.self_attn\.k_proj\.weight does not read back"):
        adapters.export_mlx(model, "fr", tmp_path / "fr")
    assert not list(tmp_path.iterdir())


def test_exports_by_command(tmp_path: Path) -> None:
    model = adapted(rank=2)
    adapters.save(model, "fr", tmp_path / "fr")
    adapters.export_mlx(model, "fr", tmp_path / "here")
    tiny.build("llama").save_pretrained(tmp_path / "base")
    words = ["export", str(tmp_path / "base"), str(tmp_path / "fr"), "--to", "mlx", "--output", str(tmp_path / "there")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"written to {tmp_path / 'there'}" in done.output
    for file in ("adapter_config.json", "adapters.safetensors"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    again = CliRunner().invoke(app, words)
    assert (again.exit_code, "exists already" in again.output) == (1, True)


# what a published config.json of the type says and transformers' own, of such a tiny model, does not; and an activation
# in the form that mlx-lm has for the type
_TINY: dict[str, dict[str, Any]] = {
    "cohere2": {"head_dim": 16, "sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {"head_dim": 16, "hidden_act": "gelu_python"},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_ctx": 128},
    "gpt_neox": {"intermediate_size": 256, "hidden_act": "gelu_pytorch_tanh", "rotary_emb_base": 10000},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "mixtral": {"num_local_experts": 4},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    "starcoder2": {"hidden_act": "gelu"},
}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {**PATTERNS, "rslora": True}),
    "first": ("lora", {"rank": 2, "targets": lambda site: site.role.startswith("attention") and ".0." in site.path}),
    "last": ("lora", {"rank": 3, "targets": lambda site: site.role.startswith("attention") and ".1." in site.path}),
    "dora": ("dora", PATTERNS),
    "dora-first": ("dora", {"rank": 2, "targets": lambda site: site.role == "attention.output" and ".0." in site.path}),
}
IDS = tiny.inputs("llama", rows=2, tokens=6)["input_ids"]


def small(kind: str) -> Any:
    sizes = {**tiny._GROUPED, "head_dim": 16, **_TINY.get(kind, {})}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **sizes)).float().eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3.0)
    return model


def write_base(model: Any, folder: Path) -> None:
    """As published: with the words of config.json that mlx-lm reads, and without a prefix where the type has none."""
    kind = model.config.model_type
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    part = rope.get("partial_rotary_factor", 1.0)
    config |= {"rope_theta": rope.get("rope_theta"), "partial_rotary_factor": part, "rotary_pct": part}
    (folder / "config.json").write_text(json.dumps({**config, **_TINY.get(kind, {})}))
    if kind == "gpt2":
        file = folder / "model.safetensors"
        held = {key.removeprefix("transformer."): w for key, w in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(held, file, {"format": "pt"})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Our logits and those of mlx-lm, for each type of model and each adapter."""
    if importlib.util.find_spec("mlx_lm") is None:  # importing it would lower this process's limit of open files
        pytest.skip("mlx-lm is not installed")
    folder = tmp_path_factory.mktemp("mlx")
    ours = {}
    for kind in LAYERS:
        model = small(kind)
        write_base(model, folder / kind / "base")
        ours[kind, "base"] = logits(model)
        for variant, (method, given) in _VARIANTS.items():
            dense = {"targets": "attention.*"} if hasattr(model.config, "num_experts_per_tok") else {}
            adapted(method, model, **{**dense, **given})
            ours[kind, variant] = logits(model)
            adapters.export_mlx(model, "fr", folder / kind / variant)
            adapters.detach(model, "fr")
    program = str(Path(__file__).with_name("other_programs.py"))
    command = [sys.executable, program, "mlx", *(str(folder / kind) for kind in LAYERS)]
    done = subprocess.run(command, input=json.dumps(IDS.tolist()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return {(kind, each): (found, torch.tensor(said[kind][each])) for (kind, each), found in ours.items()}


@pytest.mark.programs
@pytest.mark.slow
@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_mlx_lm_computes_what_is_computed_here(
    kind: str, variant: str, compared: dict[tuple[str, str], tuple[Tensor, Tensor]]
) -> None:
    base, theirs = compared[kind, "base"]
    assert relative(theirs, base) < 5e-6
    ours, theirs = compared[kind, variant]
    assert relative(theirs, ours) < 5e-6
    assert relative(base, ours) > 0.05
