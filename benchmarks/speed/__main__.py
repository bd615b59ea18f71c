"""The command: `python -m benchmarks.speed [--cases GLOB] [--pairs 5] [--plot]`."""

from __future__ import annotations

import json
import os
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from rich.console import Console

from benchmarks.result import facts
from benchmarks.speed.cases import CASES
from benchmarks.speed.step import Measured, measure
from benchmarks.speed.table import PICTURE, markdown
from benchmarks.twins import Setting

HERE = Path(__file__).parent


def main(
    cases: Annotated[str, typer.Option(help="Only cases whose name matches this glob.")] = "*",
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved pairs a case; medians count.")] = 5,
    plot: Annotated[bool, typer.Option(help="Also draw how a step grows with tokens, rank and layers.")] = False,
) -> None:
    """Measures a step of the trainer beside TRL's and PEFT's; a run of all cases writes RESULTS.md."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console, start = Console(stderr=True), time.perf_counter()
    chosen = [case for case in CASES if fnmatchcase(case.name, cases)]
    if not chosen:
        raise typer.BadParameter(f"no case matches {cases!r}; cases: {'; '.join(case.name for case in CASES)}")
    found: list[Measured] = []
    for case in chosen:
        with console.status(case.name) as status:
            found.append(measure(case, Setting(), pairs, lambda text, name=case.name: status.update(f"{name}: {text}")))  # type: ignore[misc]
        typer.echo(json.dumps(found[-1].record()))
    about = facts(time.perf_counter() - start, pairs)
    if plot:
        from benchmarks.speed.picture import draw

        draw(HERE / PICTURE, console)
    if len(chosen) == len(CASES):
        (HERE / "RESULTS.md").write_text(markdown(found, about))


if __name__ == "__main__":
    typer.run(main)
