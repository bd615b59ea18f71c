"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import adapters
from adapters.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **small)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on it whose tensors are not fresh."""
    model, _ = adapters.load_base(str(base))
    adapters.attach(model, "lora", rank=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("adapter")
    adapters.save(model, "default", folder)
    return folder


def test_help_teaches() -> None:
    done = runner.invoke(app, ["--help"])
    assert done.exit_code == 0
    assert "adapters train recipes/quickstart.yaml" in done.output
    for command in ("methods", "sites", "plan", "doctor", "train", "eval", "generate", "inspect", "merge"):
        page = runner.invoke(app, [command, "--help"])
        assert page.exit_code == 0
        assert f"adapters {command}" in page.output, "each page has an example"


def test_methods() -> None:
    done = runner.invoke(app, ["methods", "--json"])
    found = {method["name"]: method for method in json.loads(done.stdout)}
    assert set(adapters.methods.names()) == set(found)
    assert found["lora"]["formula"].startswith("LoRA: W' = W + s B A")
    settings = {"rank": 8, "alpha": 16.0, "rslora": False, "dropout": 0.0}
    assert found["dora"]["fields"] == {**settings, "rank_pattern": {}, "alpha_pattern": {}}
    assert found["lora"]["fields"] == {**found["dora"]["fields"], "bias": False}
    assert (found["lora"]["mergeable"], found["prefix"]["mergeable"]) == (True, False)
    assert "LoRA" in runner.invoke(app, ["methods"]).stdout


def test_sites(base: Path) -> None:
    done = runner.invoke(app, ["sites", str(base), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(site["role"] == "attention.query" for site in found["weights"]) == 2
    assert "attention.query" in runner.invoke(app, ["sites", str(base)]).stdout


def test_inspect(adapter: Path) -> None:
    found = json.loads(runner.invoke(app, ["inspect", str(adapter), "--json"]).stdout)
    assert (found["method"], found["hyperparameters"]["rank"]) == ("lora", 2)
    assert "lora" in runner.invoke(app, ["inspect", str(adapter)]).stdout


def test_merge_writes_a_whole_model_or_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "merged"
    done = runner.invoke(app, ["merge", str(base), str(adapter), "--output", str(output), "--json"])
    assert done.exit_code == 0, done.stderr
    certificate = json.loads(done.stdout)["certificate"]
    assert certificate["error"] <= certificate["tolerance"] < certificate["effect"]
    assert json.loads((output / "merge_certificate.json").read_text()) == certificate
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    ids = torch.tensor([[1, 5, 9, 33]])
    merged, _ = adapters.load_base(str(output))
    adapted, _ = adapters.load_base(str(base))
    adapters.load(adapted, adapter)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    again = runner.invoke(app, ["merge", str(base), str(adapter), "--output", str(output)])
    assert again.exit_code == 1
    assert "exists already" in again.stderr


def test_a_failed_merge_leaves_no_folder(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def full(self: object, folder: Path, **kwargs: object) -> None:
        Path(folder).mkdir()
        (Path(folder) / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    done = runner.invoke(app, ["merge", str(base), str(adapter), "--output", str(tmp_path / "merged")])
    assert done.exit_code == 1
    assert done.stderr.strip() == "adapters: No space left on device."
    assert list(tmp_path.iterdir()) == []


def test_refusals_are_one_sentence_and_exit_code_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    for arguments in (
        ["inspect", str(tmp_path)],
        ["sites", str(tmp_path / "none")],
        ["train", str(tmp_path / "none.yaml")],
        ["generate", str(base), "--prompt", "hi"],  # it has no tokenizer
        ["merge", str(base), str(tmp_path), "--output", str(tmp_path / "out")],
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 1, arguments
        assert done.stdout == ""
        assert done.stderr.strip().split("\n")[-1].startswith("adapters: ")
        assert "Traceback" not in done.stderr


def test_wrong_usage_is_exit_code_two() -> None:
    assert runner.invoke(app, ["train"]).exit_code == 2
    assert runner.invoke(app, ["trian"]).exit_code == 2
    assert runner.invoke(app, ["inspect", "x", "--jsn"]).exit_code == 2


def test_an_interrupt_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from adapters.train import preparing

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(preparing.LESSONS, "function_calls", interrupted)
    (tmp_path / "r.yaml").write_text("method: {name: lora}\n")
    done = runner.invoke(app, ["train", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 130
    assert "no adapter was written" in done.stderr
    assert "--set training.steps=20" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_installed_program_prints_pure_json() -> None:
    code = "from adapters.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "methods", "--json"], capture_output=True, text=True, check=True)
    assert {method["name"] for method in json.loads(done.stdout)} >= {"lora", "qlora", "bottleneck", "prefix"}
    heavy = "import sys, adapters.cli as c\ntry:\n c.app(['--help'])\nexcept SystemExit: pass\n"
    heavy += "print([m for m in ('transformers', 'trl', 'peft', 'datasets') if m in sys.modules], file=sys.stderr)"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stderr.strip() == "[]"
