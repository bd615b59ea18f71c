"""The benchmarks on a tiny model, and the arithmetic of their table against numbers made by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from benchmarks import attaching, inference, many, measure, merging, mixed, storing, trainers, training
from benchmarks.measure import Pair, Row, Side, measure_row
from benchmarks.result import COLUMNS, LIMIT, Line, facts, markdown
from benchmarks.twins import Setting

TINY = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny
model = tiny.build("llama")
"""


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    few = {"rows": 2, "tokens": 8, "adapters": 5, "mixed": 3, "prompt": 6, "pool": 4, "program": TINY}
    return Setting(lambda dtype: tiny.build("llama", dtype), scratch=tmp_path, **few)


def row(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if name in row.name)


@pytest.mark.parametrize(
    ("rows", "name", "units"),
    [
        (training.ROWS, "LoRA r16, fp32", ["CPU ms", "saved MiB"]),
        (training.ROWS, "prefix", ["CPU ms", "saved MiB"]),
        (trainers.ROWS, "SFT step, LoRA r16, fp32", ["CPU ms"]),
        (inference.ROWS, "forward, LoRA r16, fp32", ["CPU ms"]),
        (attaching.ROWS, "attach", ["CPU ms"]),
        (storing.ROWS, "load, raw", ["CPU ms"]),
        (storing.ROWS, "hot swap, raw", ["CPU ms"]),
        (storing.ROWS, "save, raw", ["CPU ms"]),
        (merging.ROWS, "merge arithmetic, fp32", ["CPU ms"]),
        (many.ROWS, "load 50", ["CPU ms"]),
        (many.ROWS, "switch among", ["CPU ms"]),
        (many.ROWS, "hot swap r8, unchecked", ["CPU ms"]),
        (many.ROWS, "hot swap r8, from memory", ["CPU ms"]),
        *((mixed.ROWS, row.name, ["CPU ms"]) for row in mixed.ROWS if row.peer == "PEFT"),
    ],
)
def test_a_row_runs_beside_peft_and_both_sides_agree(
    setting: Setting, rows: list[Row], name: str, units: list[str]
) -> None:
    lines = measure_row(row(rows, name), setting, pairs=1)
    assert [line.unit for line in lines] == units
    for line in lines:
        assert line.gated
        assert line.ratio is not None
        assert line.ratio > 0


@pytest.mark.parametrize(
    "row",
    [row for row in [*attaching.ROWS, *storing.ROWS, *many.ROWS, *mixed.ROWS] if not row.gated or row.peer != "PEFT"],
    ids=lambda row: row.name,
)
def test_a_row_without_a_gate_of_its_own_runs(setting: Setting, row: Row) -> None:
    (line,) = measure_row(row, setting, pairs=1)
    assert line.beside == row.peer
    assert len(line.theirs) == (0 if row.peer == "" else 1)


def test_sides_that_do_not_agree_are_an_error(setting: Setting) -> None:
    def differ(ours: Any, theirs: Any) -> None:
        assert ours == theirs, "not the same work"

    with pytest.raises(AssertionError, match="not the same work"):
        measure_row(Row("r", lambda _: Pair(Side(lambda: 1), Side(lambda: 2), differ)), setting, pairs=1)


def test_the_ratio_is_the_median_of_the_pairwise_ratios() -> None:
    line = Line("r", "CPU ms", (1.0, 8.0, 3.0), (2.0, 2.0, 3.0), "PEFT", True)
    assert line.ratios == (0.5, 4.0, 1.0)
    assert line.ratio == 1.0  # the ratio of the medians would be 1.5
    assert line.record()["min"] == 0.5
    assert line.record()["max"] == 4.0
    assert (line.record()["ours"], line.record()["peer"]) == (3.0, 2.0)
    assert line.cells() == ("r", "CPU ms", "3", "2", "PEFT", "1.000", "0.500", "4.000", "ok")


def test_imports_compare_the_smallest_of_each_side() -> None:
    line = Line("r", "import ms", (9.0, 5.0), (100.0, 50.0), "PEFT", True)
    assert line.ratio == 0.1
    assert line.record()["ours"] == 5.0


def test_a_limit_of_its_own_is_shown() -> None:
    assert Line("r", "CPU ms", (1.0,), (4.0,), "PEFT", True, 0.2).verdict == "over (0.2)"
    assert Line("r", "CPU ms", (1.5,), (1.0,), "bare base", True, 1.6).verdict == "ok (1.6)"


@pytest.mark.parametrize(
    ("theirs", "beside", "gated", "verdict"),
    [
        ((1.0,), "PEFT", True, "ok"),
        ((1.06 / LIMIT,), "PEFT", True, "ok"),
        ((0.9,), "PEFT", True, "over"),
        ((0.5,), "PEFT", False, "more work"),
        ((0.5,), "bare base", False, "no peer"),
        ((0.5,), "AdapterHub", False, "other release"),
        ((), "", False, "no peer"),
    ],
)
def test_verdicts(theirs: tuple[float, ...], beside: str, gated: bool, verdict: str) -> None:
    assert Line("r", "CPU ms", (1.0,), theirs, beside, gated).verdict == verdict


def test_saved_bytes_count_a_storage_once_and_parameters_not_at_all() -> None:
    w = torch.ones(256, 512, requires_grad=True)  # 0.5 MiB
    x = torch.ones(512, 1024)  # 2 MiB

    def run() -> torch.Tensor:
        return (w @ x).sum() + (w @ x.mT.mT).sum()  # the view shares the storage of x

    assert measure.saved_bytes(run, own=(w,))[0] == 2.0
    assert measure.saved_bytes(run, own=())[0] == 2.0  # nothing needs w: x wants no gradient
    assert measure.saved_bytes(run, own=(w, x))[0] == 0.0


def test_the_results_name_versions_and_no_machine() -> None:
    about = facts(12.3, 7)
    text = markdown([Line("r", "CPU ms", (1.0,), (2.0,), "PEFT", True)], about, "What is measured.")
    assert f"| {' | '.join(COLUMNS)} |" in text
    assert "| r | CPU ms | 1 | 2 | PEFT | 0.500 | 0.500 | 0.500 | ok |" in text
    assert set(json.loads(json.dumps(about))) >= {"date", "cpu", "torch", "pairs"}
    assert about["seconds"] == 12


def test_a_step_is_measured_beside_trl_and_peft(tmp_path: Path) -> None:
    """On a tiny model: the same loss and gradients, a line for it, and numbers that follow from each other."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from benchmarks.speed.cases import Case
    from benchmarks.speed.step import measure as measure_step
    from benchmarks.speed.table import markdown as steps_markdown

    rows = [{"input_ids": [7] * (n - 3) + [6, 9, 8], "labels": [-100] * (n - 3) + [6, 9, 8]} for n in (5, 11, 8)]
    case = Case("tiny", lambda dtype: tiny.build("llama", dtype), lambda: rows, torch.float32, defaults=True)
    said: list[str] = []
    found = measure_step(case, Setting(scratch=tmp_path), 2, said.append)
    assert found.losses[0] == pytest.approx(found.losses[1], rel=1e-5)
    assert 0 < found.gradient < 1e-4
    assert found.head[0] == 9 + 1  # the labelled tokens, and the one whose logits the model returns
    assert found.saved[0] < found.saved[1]
    assert len(found.ratios) == 2
    assert found.peer in said[0]
    text = steps_markdown([json.loads(json.dumps({"about": {"torch": "2"}, **asdict(found)}))])
    assert f"| tiny | {found.ours:.2f} |" in text
    assert f"{found.settable / found.ours:.2f}" in text
