"""A slice of the matrix: all laws for all methods on some model types of every head, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.matrix.pairs import HEADS, Pair, pairs
from tests.matrix.results import Row, read
from tests.matrix.reviewed import reviewed
from tests.matrix.table import table

ROOT = Path(__file__).parent.parent
EVERY = int(os.environ.get("MATRIX_EVERY", "30"))  # of so many pairs of a head, one


def matrix(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.matrix", "--results", str(results), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_a_slice_over_all_heads_holds(tmp_path: Path) -> None:
    done = matrix(tmp_path / "slice.csv", "--every", str(EVERY))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read(tmp_path / "slice.csv")
    built = {row.pair for row in rows if row.method == "build" and row.result == "pass"}
    assert {pair.head for pair in built} == set(HEADS)
    assert len(built) >= 0.9 * len(pairs()) / EVERY
    wrong = [row for row in rows if row.pair in built and row.result == "fail"]
    assert not wrong, [f"{row.pair} {row.method} {row.law}: {row.reason}" for row in wrong]
    unseen = [row for row in rows if row.result == "refused" and not reviewed(row.reason)]
    assert not unseen, [f"{row.pair} {row.method}: {row.reason}" for row in unseen]
    asked = {(row.pair, row.method, row.law) for row in rows if row.result == "pass" and row.law}
    assert {law for pair, method, law in asked if method == "lora"} == {str(law) for law in range(1, 15)}


@pytest.mark.slow
def test_it_resumes_and_keeps_what_is_done(tmp_path: Path) -> None:
    results = tmp_path / "one.csv"
    arguments = ("--types", "fnet", "--heads", "masked,token", "--methods", "lora", "--laws", "1,3")
    assert matrix(results, *arguments).returncode == 0
    whole = results.read_text()
    lines = whole.splitlines(keepends=True)
    results.write_text("".join(lines[:-1]))  # interrupted before the last pair was done
    kept = read(results)
    assert {row.pair.head for row in kept} < {"masked", "token"}
    assert matrix(results, *arguments).returncode == 0
    again = read(results)
    assert {(row.pair, row.method, row.law, row.result) for row in again} == {
        (row.pair, row.method, row.law, row.result) for row in _rows(whole, tmp_path)
    }
    results.write_text(whole.replace("transformers ", "transformers 0.", 1))
    done = matrix(results, *arguments)
    assert done.returncode == 1
    assert "was made with" in " ".join(done.stderr.split())


def _rows(text: str, folder: Path) -> list[Row]:
    (folder / "whole.csv").write_text(text)
    return read(folder / "whole.csv")


def test_the_table_counts_what_the_rows_say() -> None:
    llama, resnet = Pair("causal", "llama", "LlamaForCausalLM"), Pair("image", "resnet", "ResNetForImageClassification")
    reason = "ResNetForImageClassification has no keyvalue or layer site, which prefix needs"
    rows = [
        *(Row(pair.type, pair.head, pair.cls, "build", "", "pass", "", 0.0) for pair in (llama, resnet)),
        Row("llama", "causal", llama.cls, "lora", "1", "pass", "", 0.0),
        Row("llama", "causal", llama.cls, "lora", "2", "fail", "one reason", 0.0),
        Row("llama", "causal", llama.cls, "prefix", "1", "pass", "", 0.0),
        Row("resnet", "image", resnet.cls, "prefix", "", "refused", reason, 0.0),
        Row("resnet", "image", resnet.cls, "lora", "1", "pass", "", 0.0),
        Row("resnet", "image", resnet.cls, "ia3", "", "refused", "a reason that nobody has seen", 0.0),
    ]
    made = table(rows)
    assert "| lora | 1 | 2 |" in made
    assert "| prefix | 1 | 1 | language models and text heads |" in made
    assert "| one reason | llama/causal lora (law 2) |" in made
    assert "| **not reviewed** | ia3 | resnet/image |" in made
    assert "nowhere to put a prefix | prefix | resnet/image | this model has no keyvalue" in made
