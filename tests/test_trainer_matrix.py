"""A slice of the trainers' matrix in which every pair of values occurs, and that its checks can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters._attach import tensors_of
from tests.trainers import checks, joining
from tests.trainers.bases import build
from tests.trainers.cases import FACTORS, METHODS, ONE_BASE, Case, every, product, why_not
from tests.trainers.covering import covering
from tests.trainers.joining import NAME, Ours, Stock
from tests.trainers.loops import Run, run
from tests.trainers.material import collator, documents
from tests.trainers.results import CHECKS, Row, append, read, versions, write
from tests.trainers.table import table
from tests.trainers.watching import Watch

ROOT = Path(__file__).parent.parent
PLAIN = Case("plain", "lora", "off", "padded", "fp32", "attach")


def trainers(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.trainers", "--results", str(results), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_a_covering_set_of_cases_holds(tmp_path: Path) -> None:
    done = trainers(tmp_path / "cover.csv", "--cover", "--table", str(tmp_path / "cover.md"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read(tmp_path / "cover.csv")
    assert [row.case for row in rows] == covering(product())
    wrong = [f"{row.case}: {row.result}: {row.reason}" for row in rows if row.result != "pass"]
    assert not wrong, wrong
    for row in rows:
        asked = {check for check in CHECKS if getattr(row, check) != "-"}
        expected = {"learns", "moved", "checkpoint", "recomputed"}
        expected |= {"one_base"} if row.loop in ONE_BASE else set()
        expected |= {"like_peft"} if row.method == "lora" else set()
        expected |= {"apart"} if row.rows == "packed" else set()
        assert asked == expected, row.case
    assert f"{len(rows)} cases, each in a process of its own, of which {len(rows)} pass" in (
        tmp_path / "cover.md"
    ).read_text(encoding="utf-8")


def test_every_pair_of_values_that_a_case_has_is_covered() -> None:
    def pairs(cases: list[Case]) -> set[Any]:
        named = [[(factor, getattr(case, factor)) for factor in FACTORS] for case in cases]
        return {pair for values in named for pair in combinations(values, 2)}

    chosen = covering(product())
    assert pairs(chosen) == pairs(product())
    assert chosen == covering(product())
    assert len(chosen) < len(product()) / 10
    assert all(pairs([case for case in chosen if case != left]) != pairs(chosen) for left in chosen)


def test_the_product_leaves_out_nothing_without_a_reason() -> None:
    cases = product()
    assert len(cases) == len(set(cases))
    assert {case for case in every() if not why_not(case)} == set(cases)
    for loop in FACTORS["loop"]:
        those = [case for case in cases if case.loop == loop]
        assert {case.method for case in those} == set(FACTORS["method"])
        assert {case.checkpointing for case in those} == set(FACTORS["checkpointing"])
        assert {"attach", "folder"} <= {case.join for case in those}
    packed = {case.loop for case in cases if case.rows == "packed"}
    assert packed == {"trainer", "sft", "ours", "accelerate", "plain"}
    assert {case.loop for case in cases if case.base == "nf4"} == {"sft", "ours", "dpo"}
    taking = {case.loop for case in cases if case.join == "config"}
    assert taking == {"sft", "ours", "dpo", "kto", "grpo", "reward"}


def _row(case: Case, seconds: float = 1.0, result: str = "pass", reason: str = "", **found: str) -> Row:
    return Row.of(case, {**dict.fromkeys(CHECKS, "-"), **found}, result, reason, seconds)


@pytest.mark.slow
def test_it_resumes_and_keeps_what_is_done(tmp_path: Path) -> None:
    results = tmp_path / "some.csv"
    done, cut = PLAIN, replace(PLAIN, checkpointing="before")
    write(results, [_row(done, 123.0)])
    append(results, _row(cut, 456.0))
    results.write_text(results.read_text().rstrip()[:-2])  # interrupted while it was written
    ended = trainers(results, "--only", "plain,lora,off,before,padded,attach")
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = {row.case: row for row in read(results)}
    assert rows.keys() == {done, cut}
    assert rows[done].seconds == 123.0
    assert rows[cut].result == "pass"
    assert rows[cut].seconds < 100
    assert rows[cut].recomputed == "pass"
    results.write_text(results.read_text().replace("trl ", "trl 0."))
    with pytest.raises(ValueError, match=r"was made with .*trl 0\."):
        read(results)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Ours, Watch, Run]:
    return _trained(PLAIN, tmp_path)


def _trained(case: Case, folder: Path) -> tuple[Ours, Watch, Run]:
    ours, watch = Ours(case, folder / "saved"), Watch()
    return ours, watch, run(case, ours, folder, watch.start)


def test_a_base_that_moves_and_an_adapter_that_does_not_are_seen(trained: tuple[Ours, Watch, Run]) -> None:
    ours, _, done = trained
    checks.only_the_adapter_moves(PLAIN, done.model, ours.fresh)
    key, tensor = next(iter(tensors_of(done.model, NAME).items()))
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(ours.fresh[key])
        with pytest.raises(AssertionError, match=r"1 of 28 tensors of the adapter have not moved"):
            checks.only_the_adapter_moves(PLAIN, done.model, ours.fresh)
        tensor.copy_(kept)
        weight = done.model.model.norm.weight
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))  # one bit of the base
    with pytest.raises(AssertionError, match=r"1 tensors of the base have moved, such as model\.norm\.weight"):
        checks.only_the_adapter_moves(PLAIN, done.model, ours.fresh)


def test_a_checkpoint_that_holds_more_or_less_is_seen(trained: tuple[Ours, Watch, Run]) -> None:
    _, _, done = trained
    checks.checkpoint_is_the_adapter(PLAIN, done.model, done.folder, done.adapter)
    (done.folder / "deeper").mkdir()
    extra = done.folder / "deeper" / "model-00001.safetensors"
    extra.write_bytes((done.folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AssertionError, match="model-00001"):
        checks.checkpoint_is_the_adapter(PLAIN, done.model, done.folder, done.adapter)
    extra.unlink()
    with torch.no_grad():
        next(iter(tensors_of(done.model, NAME).values()))[0, 0] += 0.1  # after it was saved
    with pytest.raises(AssertionError, match="loaded, the outputs differ by"):
        checks.checkpoint_is_the_adapter(PLAIN, done.model, done.folder, done.adapter)


def test_a_second_base_is_seen(tmp_path: Path) -> None:
    case = Case("dpo", "bottleneck", "off", "padded", "fp32", "config")
    held: list[Any] = []
    ours, watch = Ours(case, tmp_path / "saved"), Watch()

    def start(model: Any, trainer: Any) -> None:
        watch.start(model, trainer)
        held.append(trainer)

    done = run(case, ours, tmp_path, start)
    watch.count()
    assert checks.one_base(case, done.model, watch.held) == 1.0
    held[0].ref_model = build(case)
    watch.count()
    with pytest.raises(AssertionError, match=r"1\.9\d\d times those of one base and 1 adapters"):
        checks.one_base(case, done.model, watch.held)


def test_another_scale_than_pefts_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, _, done = _trained(PLAIN, tmp_path)
    monkeypatch.setitem(joining.METHODS, "lora", {**METHODS["lora"], "alpha": 6.05})
    theirs = run(PLAIN, Stock(ours), tmp_path / "stock", lambda model, holder: None)
    with pytest.raises(AssertionError, match="the losses differ by"):
        checks.same_losses(done.losses, theirs.losses)
    with pytest.raises(AssertionError, match="numbers of ours"):
        checks.same_losses(done.losses, done.losses[:-1])


def test_checkpointing_that_is_off_and_losses_that_stay_are_seen(trained: tuple[Ours, Watch, Run]) -> None:
    _, watch, done = trained
    checks.checkpointing(PLAIN, watch)
    with pytest.raises(AssertionError, match=r"gradient_checkpointing of the layers was \{False\}"):
        checks.checkpointing(replace(PLAIN, checkpointing="after"), watch)
    watch.flags = {True}  # said to be on, and nothing was computed again
    with pytest.raises(AssertionError, match="0 recomputations for 48 forwards"):
        checks.checkpointing(replace(PLAIN, checkpointing="after"), watch)
    first, last = checks.learns(done.losses, [])
    assert last < first
    with pytest.raises(AssertionError, match="the mean of the last quarter"):
        checks.learns(done.losses[::-1], [])
    with pytest.raises(AssertionError, match="the mean of the last quarter"):
        checks.learns(done.losses, [0.5] * 4 + [0.6] * 4)


def test_documents_that_see_each_other_are_seen(tmp_path: Path) -> None:
    ours, watch, done = _trained(replace(PLAIN, rows="packed"), tmp_path)
    assert checks.documents_stay_apart(ours, watch, done.losses[0]) < 1e-5
    batch = collator("packed")(documents()[4:])
    del batch["position_ids"]  # one long row, in which all tokens see those before them
    with torch.no_grad():
        leaking = float(build(PLAIN)(**batch, use_cache=False).loss)
    with pytest.raises(AssertionError, match="the first loss differs by"):
        checks.documents_stay_apart(ours, watch, leaking)


def test_the_table_counts_what_the_rows_say() -> None:
    dpo = Case("dpo", "prefix", "after", "padded", "nf4", "attach")
    made = table(
        [
            _row(PLAIN, 2.0, like_peft="1.5e-05", learns="2.0 to 1.0"),
            _row(replace(PLAIN, checkpointing="after"), 3.5, "fail", "like_peft: one | reason", like_peft="fail"),
            _row(dpo, 1.0, "refused", "it says why", one_base="1.0107"),
        ]
    )
    assert versions() in made
    assert "3 cases, each in a process of its own, of which 1 pass" in made
    assert "| a plain loop | 1 of 2 | - | - | 3.5 s |" in made
    assert "| trl.DPOTrainer | - | - | 0 of 1, 1 refused | 1.0 s |" in made
    assert "| like_peft | 1 | 2 | 1.5e-05 |" in made
    assert "| like_peft: one \\| reason | plain/lora/after/padded/fp32/attach |" in made
    assert "| it says why | dpo/prefix/after/padded/nf4/attach |" in made
    assert "|  |  | 1.0107 |" in made
    assert "| TRL's KTOTrainer has no packing | kto |" in made
