"""What is said of a folder for each program; what PEFT and mistral.rs really do is in test_programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from laws import shake
from typer.testing import CliRunner

import adapters
from adapters.cli import app

PROGRAMS = ("peft", "vllm", "llama.cpp", "mistralrs", "mlx")
# by program: nothing but what has to be done, or the first thing that does not work
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "lora": ("lora", {"rank": 4}, ("", "", "", "", "")),
    "rslora": ("lora", {"rank": 4, "rslora": True}, ("", "", "", "", "")),
    "patterns": (
        "lora",
        {"rank": 4, "rank_pattern": {"*q_proj*": 2}, "alpha_pattern": {"*up_proj*": 3.0}},
        ("", "", "", "", ""),
    ),
    "dora": ("dora", {"rank": 4}, ("", "refused DoRA", "refused DoRA", "refused DoRA", "")),
    "bias": ("lora", {"rank": 4, "bias": True}, ("", *["refused trained biases"] * 4)),
    "ia3": ("ia3", {}, ("", *["refused the method is ia3"] * 4)),
    "bottleneck": (
        "bottleneck",
        {},
        ("refused PEFT cannot read this folder", *["refused the method is bottleneck"] * 4),
    ),
    "embeddings": (
        "lora",
        {"rank": 4, "targets": ["*embed_tokens*"]},
        ("", "", *["refused rows or changes of the embeddings"] * 3),
    ),
}


def saved(folder: Path, method: str, **options: Any) -> Path:
    model = tiny.build("llama")
    adapters.attach(model, method, name="fr", **options)
    shake(model, "fr")
    adapters.save(model, "fr", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_each_program_gets_its_verdict(case: str, tmp_path: Path) -> None:
    method, options, expected = CASES[case]
    folder = saved(tmp_path / "fr", method, **options)
    for program, wanted in zip(PROGRAMS, expected, strict=True):
        found = adapters.check_for(folder, program)
        assert found.works == (not wanted), found
        said = [f"{each.verdict} {each.what}" for each in found.findings if each.verdict != "to do"]
        assert (said[0] if said else "").startswith(wanted), found
        assert all(each.remedy for each in found.findings)


def test_a_rank_that_has_to_be_asked_for_says_how(tmp_path: Path) -> None:
    found = adapters.check_for(saved(tmp_path / "fr", "lora", rank=20), "vllm")
    assert found.works
    assert "start it with --max-lora-rank 32" in str(found)


def test_a_trained_head_is_refused_by_servers(tmp_path: Path) -> None:
    model = tiny.build("bert_classifier")
    adapters.attach(model, "lora", name="fr", rank=2)
    adapters.save(model, "fr", tmp_path)
    for program in PROGRAMS[1:]:
        assert "modules_to_save: classifier" in str(adapters.check_for(tmp_path, program))
        assert adapters.check_for(tmp_path, program).works == (program == "vllm")
    assert "--runner pooling" in str(adapters.check_for(tmp_path, "vllm"))
    assert adapters.check_for(tmp_path, "peft").works


def changed(folder: Path, **fields: Any) -> Path:
    """A folder of PEFT's own with these fields in its configuration."""
    (folder / "adapter.json").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


# what vLLM 0.32 said of each, and to it
VLLM: dict[str, tuple[dict[str, Any], str, str]] = {
    "patterns": ({"alpha_pattern": {"q_proj": 3}}, "to do", "vLLM 0.32 or newer"),
    "a pattern's rank": ({"rank_pattern": {"q_proj": 40}}, "to do", "--max-lora-rank 64"),
    "the configuration's rank": ({"r": 100}, "to do", "--max-lora-rank 128"),
    "fields that are missing": ({"r": None}, "refused", "lacks r"),
    "too large a rank": ({"r": 600}, "refused", "above 512"),
    "pissa": ({"init_lora_weights": "pissa"}, "refused", "'pissa'"),
    "drawn": ({"init_lora_weights": "gaussian"}, "", ""),
    "activated": ({"alora_invocation_tokens": [1]}, "refused", "alora_invocation_tokens"),
    "replicated": ({"layer_replication": [[0, 1]]}, "refused", "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "refused", "rows of tokens"),
    "a saved norm": ({"modules_to_save": ["norm"]}, "refused", "modules_to_save: norm"),
}


@pytest.mark.parametrize("case", VLLM)
def test_vllm_decides_by_these_fields(case: str, tmp_path: Path) -> None:
    fields, verdict, words = VLLM[case]
    found = adapters.check_for(changed(saved(tmp_path / "fr", "lora", rank=4), **fields), "vllm").findings
    assert [each.verdict for each in found] == [verdict] * (verdict != "" and len(found))
    assert words in "".join(map(str, found))


def test_peft_makes_tensors_of_the_rank_that_it_is_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "fr", "lora", rank=4)
    assert adapters.check_for(changed(folder), "peft").works
    found = adapters.check_for(changed(folder, r=6), "peft")
    assert not found.works
    assert "rank 6 in the configuration and 4 at model.layers.0" in str(found)


def test_experts_and_heads_of_bases_in_vllm(tmp_path: Path) -> None:
    moe = tiny.build("qwen3_moe")
    for name, targets in (("both", ["mlp.gate_up", "mlp.down"]), ("one", ["mlp.down"])):
        adapters.attach(moe, "lora", name=name, targets=targets)
        adapters.save(moe, name, tmp_path / name)
        for program in PROGRAMS:
            assert "adapters export --to peft" in str(adapters.check_for(tmp_path / name, program))
        adapters.export_peft(moe, name, tmp_path / f"{name} for PEFT")
        assert adapters.check_for(tmp_path / f"{name} for PEFT", "peft").works
        found = adapters.check_for(tmp_path / f"{name} for PEFT", "vllm")
        assert found.works == (name == "both"), found
        assert "experts" in str(found)
    head = saved(tmp_path / "head", "lora", targets=["head"])
    assert "Qwen2, Mistral and Gemma refuse it" in str(adapters.check_for(head, "vllm"))
    bare = tiny.build("llama").model
    adapters.attach(bare, "lora", name="fr")
    adapters.save(bare, "fr", tmp_path / "bare")
    found = adapters.check_for(tmp_path / "bare", "vllm")
    assert not found.works
    assert "without its head" in str(found)


def test_compositions_and_what_is_no_adapter_are_told(tmp_path: Path) -> None:
    model = tiny.build("llama")
    for name in ("a", "b"):
        adapters.attach(model, "lora", name=name, rank=2)
    adapters.compose(model, "both", adapters.Stack("a", "b"))
    adapters.save(model, "both", tmp_path / "both")
    found = adapters.check_for(tmp_path / "both", "vllm")
    assert not found.works
    assert "a composition of adapters" in str(found)
    (tmp_path / "empty").mkdir()
    with pytest.raises(adapters.AdapterError, match="holds no adapter"):
        adapters.check_for(tmp_path / "empty", "peft")
    with pytest.raises(adapters.AdapterError, match=r"no program 'vlm' here; did you mean 'vllm'\?"):
        adapters.check_for(tmp_path / "both", "vlm")


def test_a_damaged_folder_is_no_verdict(tmp_path: Path) -> None:
    folder = saved(tmp_path / "fr", "lora", rank=2)
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(adapters.DamagedAdapter):
        adapters.check_for(folder, "peft")


def test_the_command_says_the_same_and_ends_with_1(tmp_path: Path) -> None:
    folder = saved(tmp_path / "fr", "dora", rank=2)
    runner = CliRunner()
    done = runner.invoke(app, ["check", str(folder), "--for", "vllm", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["works"], found["findings"][0]["verdict"]) == (False, "refused")
    done = runner.invoke(app, ["check", str(folder), "--for", "peft"])
    assert (done.exit_code, done.stdout) == (0, f"{folder} in peft: works\n")


def test_exports_by_command(tmp_path: Path) -> None:
    """A base in a folder of its own: PEFT's two files, a GGUF adapter, a merged model."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = tiny.build("llama")
    base.save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "fr", "lora", rank=2)
    runner = CliRunner()

    def export(to: str, output: str, *more: str) -> Any:
        return runner.invoke(
            app, ["export", str(tmp_path / "base"), str(folder), "--to", to, "--output", str(tmp_path / output), *more]
        )

    for to, output in (("peft", "two"), ("gguf", "fr.gguf"), ("merged", "whole")):
        done = export(to, output)
        assert done.exit_code == 0, done.output
        assert f"written to {tmp_path / output}" in done.output
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    batch = tiny.inputs("llama")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "two"))(**batch).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)(**batch).logits
        torch.testing.assert_close(theirs, whole, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(theirs, base(**batch).logits, atol=1e-2)
    again = export("gguf", "fr.gguf")
    assert (again.exit_code, "exists already" in again.output) == (1, True)
    lacking = export("merged-gguf", "whole.gguf")
    assert (lacking.exit_code, "needs --base-gguf FILE" in lacking.output) == (1, True)


def test_a_folder_is_compared_with_a_base(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "base")
    tiny.build("llama", seed=1).save_pretrained(tmp_path / "other")
    folder = saved(tmp_path / "fr", "lora", rank=2)
    runner = CliRunner()
    same = runner.invoke(app, ["inspect", str(folder), "--base", str(tmp_path / "base")])
    assert (same.exit_code, "compared the base is the one recorded" in same.stdout) == (0, True)
    assert "\n  compared" not in runner.invoke(app, ["inspect", str(folder)]).stdout
    other = runner.invoke(app, ["inspect", str(folder), "--base", str(tmp_path / "other")])
    assert other.exit_code == 1
    assert re.search(r"adapters: .*base", other.output), other.output


def test_what_peft_cannot_express_is_not_exported_for_it(tmp_path: Path) -> None:
    model = tiny.build("llama")
    adapters.attach(model, "bottleneck", name="fr")
    with pytest.raises(adapters.AdapterError, match="'fr' cannot be written for stock PEFT: PEFT has no method"):
        adapters.export_peft(model, "fr", tmp_path / "fr")
    assert not (tmp_path / "fr").exists()
