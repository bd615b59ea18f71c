"""One case: the run, what must hold of it, and the same run through stock PEFT."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

import adapters
from tests.trainers import checks
from tests.trainers.cases import ONE_BASE, Case
from tests.trainers.joining import Ours, Stock
from tests.trainers.loops import Run, run
from tests.trainers.results import CHECKS, Row
from tests.trainers.watching import Watch


def examine(case: Case) -> Row:
    """The row of a case."""
    started = time.monotonic()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    found: dict[str, Any] = dict.fromkeys(CHECKS, "-")
    try:
        with tempfile.TemporaryDirectory() as folder:
            reasons = _examined(case, Path(folder), found)
        result = "fail" if reasons else "pass"
    except adapters.AdapterError as error:
        result, reasons = "refused", [str(error)]
    except Exception as error:  # whatever a trainer may raise is the row's content
        result, reasons = "fail", [_reason(error)]
    return Row.of(case, found, result, "; ".join(reasons), time.monotonic() - started)


def _examined(case: Case, place: Path, found: dict[str, Any]) -> list[str]:
    reasons: list[str] = []

    def check(name: str, measure: Callable[[], Any]) -> None:
        try:
            found[name] = measure()
        except AssertionError as error:
            found[name] = "fail"
            reasons.append(f"{name}: {error}")

    ours, watch = Ours(case, place / "saved"), Watch()
    done = run(case, ours, place / "ours", watch.start)
    watch.count()
    check("learns", lambda: "{:.4f} to {:.4f}".format(*checks.learns(done.losses, done.rewards)))
    check("moved", lambda: checks.only_the_adapter_moves(case, done.model, ours.fresh) or "pass")
    check("recomputed", lambda: checks.checkpointing(case, watch) or "pass")
    check("checkpoint", lambda: checks.checkpoint_is_the_adapter(case, done.model, done.folder, done.adapter) or "pass")
    if case.loop in ONE_BASE:
        check("one_base", lambda: f"{checks.one_base(case, done.model, watch.held):.4f}")
    if case.rows == "packed":
        check("apart", lambda: f"{checks.documents_stay_apart(ours, watch, done.losses[0]):.1e}")
    if case.method == "lora":
        check("like_peft", lambda: f"{_like_peft(case, place, ours, done):.1e}")
    return reasons


def _like_peft(case: Case, place: Path, ours: Ours, done: Run) -> float:
    """The largest difference to stock PEFT's run; `adapters.train` is compared with TRL's trainer."""
    if any(tensor.dtype != torch.float32 for tensor in ours.fresh.values()):
        # TRL rounds what trains on a 4-bit base to bf16, and PEFT the activations too: both are given fp32 to compare
        ours = replace(ours, precise=True)
        done = run(case, ours, place / "precise", lambda model, holder: None)
    twin = replace(case, loop="sft") if case.loop == "ours" else case
    stock = Stock(replace(ours, case=twin, precise=case.base == "nf4"))
    theirs = run(twin, stock, place / "stock", lambda model, holder: None)
    rewards = checks.same_losses(done.rewards, theirs.rewards) if done.rewards else 0.0
    return max(rewards, checks.same_losses(done.losses, theirs.losses))


def _reason(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())}"[:400]
