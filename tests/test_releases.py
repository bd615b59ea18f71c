"""Adapters that earlier versions saved load as they were: the same base is recognised, the same numbers come out."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from releases import make

import adapters
from adapters._store.record import FORMAT, READABLE

RELEASES = sorted(Path(__file__).parent.glob("releases/*.zip"))


def _kept() -> list[Any]:
    found = []
    for archive in RELEASES:
        with zipfile.ZipFile(archive) as file:
            names = json.loads(file.read("golden.json"))
        found += [pytest.param(archive, name, id=f"{archive.stem}-{name}") for name in names]
    return found


def base_of(name: str) -> Any:
    model = make.base(make.CASES[name][0])
    if name == "qlora":
        adapters.quantize(model, "nf4", compute_dtype=torch.float32)
    return model


def unpacked(archive: Path, name: str, folder: Path) -> tuple[Path, torch.Tensor]:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder, [each for each in file.namelist() if each.startswith(f"{name}/")])
        golden = json.loads(file.read("golden.json"))[name]
    return folder / name, torch.tensor(golden)


def seen(model: Any) -> torch.Tensor:
    return make.output(model).flatten()[::7]


@pytest.mark.parametrize(("archive", "name"), _kept())
def test_what_was_saved_then_loads_now(archive: Path, name: str, tmp_path: Path) -> None:
    folder, golden = unpacked(archive, name, tmp_path)
    model = base_of(name)
    before = seen(model)
    report = adapters.load(model, folder)
    assert "agree" in report.base
    torch.testing.assert_close(seen(model), golden, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(before, golden, atol=1e-2)
    again = base_of(name)
    adapters.save(model, report.name, tmp_path / "again")
    adapters.load(again, tmp_path / "again")
    assert torch.equal(seen(again), seen(model))


@pytest.mark.parametrize("archive", RELEASES, ids=lambda path: path.stem)
def test_another_base_is_refused_by_the_fingerprints_of_then(archive: Path, tmp_path: Path) -> None:
    folder, _ = unpacked(archive, "lora", tmp_path)
    model = base_of("lora")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.01)
    with pytest.raises(adapters.WrongBase):
        adapters.load(model, folder)


@pytest.mark.parametrize("name", ["lora", "lora-bias", "lora-tables", "dora", "ia3"])
@pytest.mark.parametrize("archive", RELEASES, ids=lambda path: path.stem)
def test_stock_peft_still_reads_them(archive: Path, name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, golden = unpacked(archive, name, tmp_path)
    if (archive.stem, name) == ("format-1", "lora-tables"):  # which was not written for PEFT then
        assert not (folder / "adapter_config.json").exists()
        return
    model = peft.PeftModel.from_pretrained(base_of(name), folder).eval()
    torch.testing.assert_close(seen(model), golden, rtol=1e-4, atol=2e-5)


def test_every_format_and_every_method_is_kept() -> None:
    formats, methods = set(), set()
    for archive in RELEASES:
        with zipfile.ZipFile(archive) as file:
            records = [json.loads(file.read(each)) for each in file.namelist() if each.endswith("adapter.json")]
        formats |= {record["format"] for record in records}
        methods |= {record["method"]["name"] for record in records}
    assert formats == {*READABLE} == {1, 2, FORMAT}
    assert methods >= {"lora", "qlora", "dora", "ia3", "bottleneck", "fuse", "prefix"}
