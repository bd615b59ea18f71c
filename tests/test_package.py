"""The package as a whole: what importing it costs, what it refuses, what it exports."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import adapters

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT
    )


def test_importing_loads_torch_and_nothing_heavier() -> None:
    heavy = ["transformers", "peft", "trl", "bitsandbytes", "datasets"]
    code = f"import sys, adapters; print([m for m in {heavy} if m in sys.modules])"
    result = run(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_our_own_modules_import_in_under_50_ms() -> None:
    code = "import time, torch; start = time.perf_counter(); import adapters; print(time.perf_counter() - start)"
    assert min(float(run(code).stdout) for _ in range(5)) < 0.05


def test_the_other_distribution_of_the_same_import_name_is_named(tmp_path: Path) -> None:
    info = tmp_path / "adapters-1.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adapters\nVersion: 1.3.0\n")
    result = run("import adapters", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "AdapterHub" in last
    assert "pip uninstall adapters adapter-registry" in last
    assert "1.3.0" in last


@pytest.mark.parametrize("name", adapters.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(adapters, name)
    if not name[0].isupper() or inspect.isclass(value):
        assert (inspect.getdoc(value) or "").strip(), name


def test_every_method_states_its_formula_and_source() -> None:
    for name in adapters.methods.names():
        cls = adapters.methods.get(name)
        assert re.search(r"[:=]", (cls.__doc__ or "").splitlines()[0]), name
        assert re.search(r"arXiv \d{4}\.\d{5}", inspect.getmodule(cls).__doc__ or ""), name


def test_an_unknown_method_or_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        adapters.AdapterError, match=r"did you mean 'bottleneck'\? Methods here: bottleneck, dora, fuse"
    ):
        adapters.methods.get("bottlneck")
    import tiny

    with pytest.raises(adapters.AdapterError, match=r"no field 'rnk'; did you mean 'rank'\?"):
        adapters.attach(tiny.build("llama"), "lora", rnk=4)
    for bad, sentence in (({"rank": 0}, "at least 1"), ({"dropout": 1.0}, "below 1")):
        with pytest.raises(adapters.AdapterError, match=sentence):
            adapters.attach(tiny.build("llama"), "lora", **bad)


def test_nothing_in_the_package_names_an_architecture() -> None:
    """Architectures are found by structure: no model type of transformers appears as a string in the code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = {
        name for name in CONFIG_MAPPING_NAMES if len(name) > 3 and name not in {"align", "flava", "dots1", "switch"}
    }
    found = []
    for file in (ROOT / "adapters").rglob("*.py"):
        if "_hub" in file.parts or "cli" in file.parts or "data" in file.parts:
            continue  # the embedded models are named there
        if "_gguf" in file.parts:
            continue  # llama.cpp's files name architectures, and store their weights by name
        if "_mlx" in file.parts:
            continue  # where mlx-lm has the layers of which type
        for literal in re.findall(r'"([a-z0-9_]+)"', file.read_text()):
            if literal in types:
                found.append((file.name, literal))
    assert found == []


def test_the_oldest_and_newest_transformers_are_stated_and_tried() -> None:
    oldest, newest = re.search(r"for release in (\S+) (\S+);", (ROOT / ".ci/run").read_text()).groups()  # type: ignore[union-attr]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={oldest.removesuffix('.0')}" in declared
    assert f"transformers {oldest} to {newest}" in " ".join((ROOT / "README.md").read_text().split())
