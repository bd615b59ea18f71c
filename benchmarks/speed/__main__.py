"""The command: `python -m benchmarks.speed [--cases GLOB] [--pairs 5] [--plot]`."""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from rich.console import Console

from benchmarks.result import facts
from benchmarks.speed.cases import CASES
from benchmarks.speed.step import measure
from benchmarks.speed.table import PICTURE, markdown
from benchmarks.twins import Setting

HERE = Path(__file__).parent
KEPT = HERE / "results.json"


def main(
    cases: Annotated[str, typer.Option(help="Only cases whose name matches this glob.")] = "*",
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved pairs a case; medians count.")] = 5,
    plot: Annotated[bool, typer.Option(help="Also draw how a step grows with tokens, rank and layers.")] = False,
) -> None:
    """Measures a step of the trainer beside TRL's and PEFT's, case by case, and writes RESULTS.md anew.

    What was measured is kept in results.json with where and when, so that cases may be run on their own.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console = Console(stderr=True)
    chosen = [case for case in CASES if fnmatchcase(case.name, cases)]
    if not chosen:
        raise typer.BadParameter(f"no case matches {cases!r}; cases: {'; '.join(case.name for case in CASES)}")
    for case in chosen:
        start = time.perf_counter()
        with console.status(case.name) as status:
            measured = measure(case, Setting(), pairs, lambda text, name=case.name: status.update(f"{name}: {text}"))  # type: ignore[misc]
        record = {"about": facts(time.perf_counter() - start, pairs), **asdict(measured)}
        typer.echo(json.dumps(record))
        found = _kept() | {case.name: record}
        text = json.dumps({case.name: found[case.name] for case in CASES if case.name in found}, indent=1)
        KEPT.write_text(f"{text}\n")
    if plot:
        from benchmarks.speed.picture import draw

        draw(HERE / PICTURE, console)
    (HERE / "RESULTS.md").write_text(markdown(list(_kept().values())))


def _kept() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    return found


if __name__ == "__main__":
    typer.run(main)
