"""The command: `python -m benchmarks [--rows PATTERN] [--pairs 7] [--json] [--no-gate]`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks the Hub, and PEFT would look there for the base
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import adapterhub as hub
from benchmarks import attaching, importing, inference, many, merging, mixed, storing, trainers, training
from benchmarks.measure import Row, measure_row
from benchmarks.result import COLUMNS, LIMIT, Line, facts, markdown
from benchmarks.twins import Setting

ROWS: list[Row] = [
    *training.ROWS,
    *trainers.ROWS,
    *inference.ROWS,
    *attaching.ROWS,
    *storing.ROWS,
    *merging.ROWS,
    *many.ROWS,
    *mixed.ROWS,
    *importing.ROWS,
]
RESULTS = Path(__file__).with_name("RESULTS.md")
PREFACE = f"""
SmolLM2-135M-Instruct, LoRA on every linear layer but the head, batches of 2 rows of 64 tokens, one thread. Each row
runs ours and PEFT's in turn in one process, and checks in every pair that both computed the same. `ours / peer` is the
median of the pairwise ratios, `min` and `max` are the smallest and the largest of them; times are the medians of each
side. A row in which both sides do the same work is `ok` up to {LIMIT} and `over` above; `more work` marks functions
that verify what PEFT does not. `import ms` is the smallest of five new processes. A number behind a verdict is a limit
of the row's own. `read + copy` reads a file with safetensors and copies its tensors. AdapterHub runs in an environment
of its own, with an older transformers (`python -m benchmarks --adapterhub`): compared is how much longer a forward
takes than the bare base's beside it, and `own ms` is what each side measured in its process.
"""


def main(
    rows: Annotated[str, typer.Option(help="Only rows whose name contains this text or matches this glob.")] = "*",
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved pairs a row; the median of their ratios counts.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    adapterhub: Annotated[bool, typer.Option(help="Also rows beside AdapterHub, in its own environment.")] = False,
    gate: Annotated[bool, typer.Option(help="End with 1 when a row of the same work is over the limit.")] = True,
) -> None:
    """Measures the library beside PEFT and prints one table; a run of every row also writes RESULTS.md.

    Exit code: 0, or 1 when a row that does the same work takes more than 1.05 times PEFT's (not with --no-gate).
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # PEFT warns of what these rows do on purpose
    known = [*ROWS, *(_beside_adapterhub() if adapterhub else [])]
    chosen = [row for row in known if fnmatchcase(row.name, rows) or rows in row.name]
    if not chosen:
        raise typer.BadParameter(f"no row matches {rows!r}; rows: {'; '.join(row.name for row in known)}")
    start = time.perf_counter()
    lines = run(chosen, Setting(), pairs)
    about = facts(time.perf_counter() - start, pairs)
    if as_json:
        typer.echo(json.dumps({"about": about, "rows": [line.record() for line in lines]}, indent=1))
    else:
        _print(lines)
    if len(chosen) == len(known):
        RESULTS.write_text(markdown(lines, about, PREFACE))
    raise typer.Exit(int(gate and any(line.verdict.startswith("over") for line in lines)))


def _beside_adapterhub() -> list[Row]:
    try:
        hub.environment()
    except RuntimeError as error:
        Console(stderr=True).print(f"left out: {error}")
        return []
    return hub.ROWS


def run(chosen: list[Row], setting: Setting, pairs: int) -> list[Line]:
    """Measures rows one after the other, with progress on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lines: list[Line] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        everything = progress.add_task("rows", total=len(chosen))
        for row in chosen:
            missing = [name for name in row.needs if importlib.util.find_spec(name) is None]
            if missing:
                progress.console.print(f"left out, because {', '.join(missing)} is not installed: {row.name}")
            else:
                task = progress.add_task(row.name, total=None)
                lines += measure_row(row, setting, pairs, lambda task=task: progress.advance(task))  # type: ignore[misc]
                progress.remove_task(task)
            progress.advance(everything)
    shutil.rmtree(setting.scratch, ignore_errors=True)
    return lines


def _print(lines: list[Line]) -> None:
    table = Table(title="beside PEFT")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i in (2, 3, 5, 6, 7) else "left")
    for line in lines:
        style = {"over": "red", "ok": "green"}.get(line.verdict.partition(" ")[0])
        table.add_row(*line.cells(), style=style)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
