"""`python -m tests.matrix`: any slice of methods, types and laws; resumes where it was interrupted; writes a table."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# imported once, before the processes are forked: what most of them need
from transformers import (  # noqa: F401
    BertForMaskedLM,
    LlamaForCausalLM,
    MambaForCausalLM,
    Qwen3MoeForCausalLM,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from tests.matrix.isolate import Done, isolated
from tests.matrix.methods import METHODS
from tests.matrix.pairs import HEADS, Pair, pairs
from tests.matrix.results import DONE, Row, append, read, write
from tests.matrix.run import run
from tests.matrix.table import table

SECONDS, GIGABYTES = 300.0, 8  # for one pair
Words = Annotated[str, typer.Option(help="Comma-separated; all where empty.")]


def main(
    heads: Words = "",
    types: Words = "",
    methods: Words = "",
    laws: Annotated[str, typer.Option(help="Numbers of laws, comma-separated; all where empty.")] = "",
    every: Annotated[int, typer.Option(help="Of n pairs of a head take one, the same with each transformers.")] = 1,
    results: Annotated[Path, typer.Option(help="Results as CSV; finished pairs in it are not run again.")] = Path(
        "out/matrix.csv"
    ),
    output: Annotated[Path | None, typer.Option("--table", help="Write the table here, as Markdown.")] = None,
    workers: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
) -> None:
    """Run the laws on tiny models of all of transformers' types, each in a process of its own."""
    torch.set_num_threads(1)
    chosen = _chosen(_words(heads, HEADS), _words(types, {pair.type for pair in pairs()}), every)
    names = _words(methods, METHODS) or list(METHODS)
    numbers = [int(law) for law in laws.split(",") if law]
    console = Console(stderr=True)
    try:
        rows = read(results)
    except ValueError as error:
        console.print(str(error))
        raise typer.Exit(1) from error
    results.parent.mkdir(parents=True, exist_ok=True)
    write(results, rows)
    known = {row.pair for row in rows}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("pairs", total=len(chosen))
        progress.advance(task, sum(pair in known for pair in chosen))
        waiting = [pair for pair in chosen if pair not in known]
        for done in isolated(waiting, lambda pair, emit: run(pair, emit, names, numbers), workers, SECONDS, GIGABYTES):
            new = _rows(done)
            append(results, new)
            rows += new
            progress.advance(task)
            for row in new:
                if row.result in ("fail", "refused"):
                    law = f" law {row.law}" if row.law else ""
                    console.print(
                        f"{row.pair} {row.method}{law}: {row.result}: {row.reason}", markup=False, soft_wrap=True
                    )
    wanted = [row for row in rows if row.pair in set(chosen)]
    _summary(wanted, console)
    if output is not None:
        output.write_text(table(wanted))


def _words(text: str, known: object) -> list[str]:
    words = [word for word in text.split(",") if word]
    for word in words:
        if word not in known:  # type: ignore[operator]
            raise typer.BadParameter(f"{word!r} is none of those that there are")
    return words


def _chosen(heads: list[str], types: list[str], every: int) -> list[Pair]:
    """The pairs asked for; of `every` of a head one, by a checksum of the name, which no release changes."""
    fit = [p for p in pairs() if (not heads or p.head in heads) and (not types or p.type in types)]
    chosen: list[Pair] = []
    for head in HEADS:
        of_head = [p for p in fit if p.head == head]
        count = -(-len(of_head) // every)
        first = sorted(of_head, key=lambda p: zlib.crc32(str(p).encode()))[:count]
        chosen += [p for p in of_head if p in first]
    return chosen


def _rows(done: Done[Pair]) -> list[Row]:
    pair = done.job
    sent = [*done.sent, *([("job", "", "fail", done.ended, done.seconds)] if done.ended else [])]
    sent.append((DONE, "", "", "", done.seconds))
    return [Row(pair.type, pair.head, pair.cls, *row[:4], round(row[4], 3)) for row in sent]


def _summary(rows: list[Row], console: Console) -> None:
    worst = {"fail": 0, "refused": 1, "not run": 2, "pass": 3, "no object": 4}
    ended: dict[tuple[Pair, str], str] = {}
    for row in rows:
        if row.method != DONE:
            key = (row.pair, row.method)
            ended[key] = min(ended.get(key, "no object"), row.result, key=worst.__getitem__)
    for method in ("build", "map", *METHODS, "job"):
        counts = Counter(result for (_, name), result in ended.items() if name == method)
        if counts:
            console.print(f"{method:10}", ", ".join(f"{count} {result}" for result, count in counts.items()))


if __name__ == "__main__":
    typer.run(main)
