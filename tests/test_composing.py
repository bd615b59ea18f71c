"""Compositions in folders: made on the command line, looked at, replaced without a moment in which neither is whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import output, relative, shake
from typer.testing import CliRunner

import adapters
from adapters._attach import tensors_of
from adapters._store import commit
from adapters._store.bundle import PARTS
from adapters.cli import app

BATCH = tiny.inputs("llama")
runner = CliRunner()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for seed, name in enumerate(("fr", "de")):
        model = tiny.build("llama")
        adapters.attach(model, "lora", name=name, rank=3 + seed)
        shake(model, name, seed, 0.2)
        made[name] = tmp_path_factory.mktemp("parts") / name
        adapters.save(model, name, made[name])
    return made


@pytest.mark.parametrize(
    ("words", "selection"),
    [
        (["{fr}", "{de}", "--stack"], adapters.Stack("fr", "de")),
        (["{fr}=0.3", "{de}=-0.5", "--average"], adapters.Average("fr", "de", weights=(0.3, -0.5))),
        (["{de}", "{fr}", "--split", "3"], adapters.Split("de", "fr", at=(3,))),
    ],
)
def test_the_command_line_keeps_the_parts(
    words: list[str], selection: Any, parts: dict[str, Path], tmp_path: Path
) -> None:
    given = [word.format(**parts) for word in words]
    result = runner.invoke(app, ["compose", str(tmp_path / "both"), *given])
    assert result.exit_code == 0, result.output
    model, plain = tiny.build("llama"), tiny.build("llama")
    report = adapters.load(model, tmp_path / "both")
    assert report.method == repr(selection)
    for name, folder in parts.items():
        adapters.load(plain, folder, name=name)
    adapters.activate(plain, selection)
    assert torch.equal(output(model, BATCH), output(plain, BATCH))
    info = adapters.inspect(tmp_path / "both")
    assert (info.name, info.method) == ("both", repr(selection))
    assert info.parameters == report.parameters
    assert runner.invoke(app, ["inspect", str(tmp_path / "both")]).exit_code == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{fr}", "{fr}", "--stack"], "two adapters are called 'fr'"),
        (["{fr}", "{de}", "--stack", "--average"], "one of --stack, --average and --split"),
        (["{fr}", "{de}", "--average"], "is not FOLDER=WEIGHT"),
        (["{fr}", "{de}", "--split", "3", "--split", "2"], "ascending"),
    ],
)
def test_the_command_line_refuses(words: list[str], sentence: str, parts: dict[str, Path], tmp_path: Path) -> None:
    result = runner.invoke(app, ["compose", str(tmp_path / "no"), *[word.format(**parts) for word in words]])
    assert result.exit_code == 1
    assert sentence in result.output
    assert not (tmp_path / "no").exists()


def test_a_composition_is_read_and_exchanged_as_one(parts: dict[str, Path], tmp_path: Path) -> None:
    runner.invoke(app, ["compose", str(tmp_path / "both"), str(parts["fr"]), str(parts["de"]), "--stack"])
    with pytest.raises(adapters.AdapterError, match=r"adapters\.load brings it"):
        adapters.read(tmp_path / "both")
    result = runner.invoke(
        app, ["compose", str(tmp_path / "more"), str(tmp_path / "both"), str(parts["fr"]), "--stack"]
    )
    assert "is a composition itself" in result.output
    part = next((tmp_path / "both").glob("part-*"))
    other = parts["fr"] if "fr" not in adapters.inspect(part).name else parts["de"]
    for name in os.listdir(part):
        (part / name).write_bytes((other / name).read_bytes())  # a whole adapter, and not the one that belongs there
    with pytest.raises(adapters.DamagedAdapter, match="is not the adapter that was saved there"):
        adapters.load(tiny.build("llama"), tmp_path / "both")


def test_a_part_that_is_attached_in_another_dtype_is_told_so(parts: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.build("llama")
    for name in ("fr", "de"):
        adapters.load(model, parts[name])
    adapters.compose(model, "both", adapters.Stack("fr", "de"))
    adapters.save(model, "both", tmp_path, dtype="bfloat16")
    adapters.activate(model, "de")
    before = output(model, BATCH)
    with pytest.raises(adapters.AdapterError, match=r"'(fr|de)' and was saved in bfloat16; .* is in float32"):
        adapters.load(model, tmp_path, name="again")
    assert torch.equal(output(model, BATCH), before)
    again = tiny.build("llama")
    adapters.load(again, tmp_path)
    adapters.activate(model, "both")
    assert relative(output(again, BATCH), output(model, BATCH)) > 1e-4
    for name in ("fr", "de"):  # rounded, and else the same
        for tensor in tensors_of(model, name).values():
            tensor.copy_(tensor.bfloat16())
    torch.testing.assert_close(output(again, BATCH), output(model, BATCH), rtol=1e-5, atol=1e-5)


def test_a_save_that_ends_before_its_last_step_leaves_the_old_composition(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama")
    for name, folder in parts.items():
        adapters.load(model, folder, name=name)
    adapters.compose(model, "both", adapters.Stack("fr", "de"))
    adapters.save(model, "both", tmp_path)
    adapters.activate(model, "both")
    before = output(model, BATCH)
    adapters.detach(model, "both")
    adapters.swap(model, "fr", parts["de"])
    adapters.compose(model, "both", adapters.Average("fr", "de"))
    write = commit.write

    def full(folder: Any, files: Any, owned: Any) -> None:
        if PARTS in files:
            raise adapters.AdapterError("the disk is full")
        write(folder, files, owned)

    monkeypatch.setattr(commit, "write", full)
    with pytest.raises(adapters.AdapterError, match="disk is full"):
        adapters.save(model, "both", tmp_path)
    monkeypatch.undo()
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path)
    assert torch.equal(output(fresh, BATCH), before)
    adapters.save(model, "both", tmp_path)  # the next one completes, and clears away
    assert len(list(tmp_path.glob("part-*"))) == 2
    adapters.activate(model, "both")
    again = tiny.build("llama")
    adapters.load(again, tmp_path)
    assert torch.equal(output(again, BATCH), output(model, BATCH))
