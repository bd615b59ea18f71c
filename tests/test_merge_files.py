"""Merging into files, shard by shard, against merging in memory; broken off, gone on with, refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import shake
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import adapters
from adapters._merge import files as merging
from adapters.cli import app

NOISE = 0.03


def adapted(kind: str = "llama", method: str = "lora", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny.build(kind, dtype)
    torch.manual_seed(0)
    adapters.attach(model, method, name="fr", **options)
    shake(model, "fr", noise=NOISE)
    return model


def content(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / merging.INDEX).read_text())["weight_map"]
    held = {file: load_file(folder / file) for file in set(index.values())}
    assert {name for each in held.values() for name in each} == index.keys()
    return {name: held[file][name] for name, file in index.items()}


CASES = [
    ("llama", "lora", torch.float32, {"rank": 3}),
    ("llama", "dora", torch.bfloat16, {"rank": 3}),
    ("gpt2", "ia3", torch.float32, {}),
    ("gpt2", "lora", torch.float32, {"rank": 2, "bias": True}),
    ("qwen3_moe", "lora", torch.float32, {"rank": 2}),
]


@pytest.mark.parametrize(("kind", "method", "dtype", "options"), CASES)
def test_the_files_hold_what_merging_in_memory_gives(
    kind: str, method: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    model, twin = adapted(kind, method, dtype, **options), adapted(kind, method, dtype, **options)
    with torch.no_grad():
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.copy_(one)  # what the methods drew
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    expected = adapters.merge(twin, "fr")
    held, wanted = content(tmp_path / "merged"), dict(twin.named_parameters())
    assert held.keys() == wanted.keys()
    for name, p in wanted.items():
        assert torch.equal(held[name], p), name
    # the same weights elsewhere in memory may be multiplied in another order: the noise of the dtype
    close: dict[str, float] = {"rel": 0.2, "abs": 1e-6}
    assert found.error == pytest.approx(expected.error, **close)
    assert found.effect == expected.effect > 10 * found.error
    assert [(site.path, site.predicted) for site in found.sites] == [(s.path, s.predicted) for s in expected.sites]
    for one, other in zip(found.sites, expected.sites, strict=True):
        assert one.seen == (None if other.seen is None else pytest.approx(other.seen, **close))
    sizes = [path.stat().st_size for path in (tmp_path / "merged").glob("model-*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < max(60_000, *(p.nbytes for p in wanted.values())) + 5_000
    kept = json.loads((tmp_path / "merged" / merging.CERTIFICATE).read_text())
    assert kept["error"] == found.error
    assert not list(tmp_path.glob(".merged*"))


def test_a_merge_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(rank=3)
    whole = adapters.merge_files(model, "fr", tmp_path / "whole", shard="60KB")
    count = len(list((tmp_path / "whole").glob("model-*")))
    inner, written = merging.save_file, []

    def broken(tensors: Any, file: Path, *args: Any) -> None:
        if len(written) == 3:
            inner({name: tensor[:1] for name, tensor in tensors.items()}, file, *args)
            raise KeyboardInterrupt
        written.append(file)
        inner(tensors, file, *args)

    monkeypatch.setattr(merging, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(merging, "save_file", lambda *args: (written.append(args[1]), inner(*args))[1])
    again = adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    assert len(written) == count
    assert again == whole
    assert all(torch.equal(p, content(tmp_path / "whole")[name]) for name, p in content(tmp_path / "merged").items())


def test_another_merge_does_not_go_on_with_these_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(rank=3)
    inner = merging.settle
    monkeypatch.setattr(merging, "settle", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    monkeypatch.setattr(merging, "settle", inner)
    shake(model, "fr", seed=3, noise=NOISE)
    adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    adapters.merge(model, "fr")
    held = content(tmp_path / "merged")
    assert all(torch.equal(held[name], p) for name, p in model.named_parameters())


def test_a_base_that_changed_where_no_fingerprint_looks_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(rank=3)
    monkeypatch.setattr(merging, "_complete", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    monkeypatch.undo()
    with torch.no_grad():
        model.model.embed_tokens.weight[17, 3] += 0.5
    adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    adapters.merge(model, "fr")
    held = content(tmp_path / "merged")
    assert all(torch.equal(held[name], p) for name, p in model.named_parameters())


def test_the_configuration_says_what_the_files_hold(tmp_path: Path) -> None:
    model = adapted(rank=3).to(torch.bfloat16)  # whose configuration still says float32
    model.config.architectures = ["Another"]
    adapters.merge_files(model, "fr", tmp_path / "merged")
    found = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (found["architectures"], found["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_a_merge_beyond_the_tolerance_leaves_nothing(tmp_path: Path) -> None:
    model = adapted(dtype=torch.bfloat16, rank=3)
    with pytest.raises(adapters.AdapterError, match=r"changes the outputs by .*, more than the tolerance of 1e-09"):
        adapters.merge_files(model, "fr", tmp_path / "merged", tolerance=1e-9)
    assert not list(tmp_path.iterdir())


def test_a_bias_without_a_place_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(adapters.AdapterError, match=r"trains a bias at .*, which has none"):
        adapters.merge_files(adapted(rank=2, bias=True), "fr", tmp_path / "merged", shard="60KB")
    assert not list(tmp_path.iterdir())


def test_folders_that_exist_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(adapters.AdapterError, match="exists already"):
        adapters.merge_files(adapted(rank=2), "fr", tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_by_command(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "base")
    model = adapted(rank=3)
    adapters.save(model, "fr", tmp_path / "fr")
    places = [str(tmp_path / name) for name in ("base", "fr", "merged")]
    done = CliRunner().invoke(app, ["merge", *places[:2], "--output", places[2], "--shards", "60KB"])
    assert done.exit_code == 0, done.output
    assert "into 14 weights" in done.output
    again = AutoModelForCausalLM.from_pretrained(places[2], dtype=torch.float32)
    batch = tiny.inputs("llama")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    bad = CliRunner().invoke(app, ["merge", *places[:2], "--output", f"{places[2]}2", "--shards", "60XB"])
    assert (bad.exit_code, "write a number and a unit" in bad.output) == (1, True)


PROGRAM = """
import re, sys, threading, time
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
import adapters
from adapters._attach import tensors_of

peak, stop = 0, False

def watch():
    global peak
    while not stop:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
        time.sleep(0.005)

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
adapters.attach(model, "lora", name="fr", rank=4)
with torch.no_grad():
    for tensor in tensors_of(model, "fr").values():
        tensor.add_(0.01 * torch.randn(tensor.shape))
start = int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
threading.Thread(target=watch, daemon=True).start()
print(adapters.merge_files(model, "fr", sys.argv[2], shard=sys.argv[3]))
stop = True
print("anonymous KiB:", start, peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    """A base of 600 MB in files of 50 MB: what the process holds of its own stays far below the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "vocab_size": 1000}
    base = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=8, **sizes)).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    size = sum(p.nbytes for p in base.parameters())
    assert size > 600e6
    del base
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "base"), str(tmp_path / "merged"), "50MB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    start, peak = map(int, re.search(r"anonymous KiB: (\d+) (\d+)", done.stdout).groups())  # type: ignore[union-attr]
    assert (peak - start) * 1024 < size / 2
    assert "into 14 files in bfloat16" in done.stdout
