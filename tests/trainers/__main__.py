"""`python -m tests.trainers`: all cases, or a pairwise covering set; resumes what was interrupted; writes a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

# imported once, before the processes are forked
import sentence_transformers  # noqa: F401
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import BertModel, LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

from tests.matrix.isolate import Done, isolated
from tests.trainers.bases import prepare
from tests.trainers.cases import FACTORS, Case, product
from tests.trainers.covering import covering
from tests.trainers.results import CHECKS, Row, append, read, write
from tests.trainers.run import examine
from tests.trainers.table import table

SECONDS, GIGABYTES = 180.0, 12  # for one case; the address space counts what libraries map and never use


def main(
    only: Annotated[str, typer.Option(help="Values of factors, comma-separated: sft,dpo,lora. All where empty.")] = "",
    cover: Annotated[bool, typer.Option("--cover", help="A set in which every pair of values occurs.")] = False,
    results: Annotated[Path, typer.Option(help="Results as CSV; finished cases in it are not run again.")] = Path(
        "out/trainers.csv"
    ),
    output: Annotated[Path | None, typer.Option("--table", help="Write the table here, as Markdown.")] = None,
    workers: Annotated[int, typer.Option(help="Processes side by side.")] = 1,
) -> None:
    """Train tiny models by every loop with every kind of method, each in a process of its own."""
    torch.set_num_threads(1)
    chosen = _chosen([word for word in only.split(",") if word], cover)
    console = Console(stderr=True)
    try:
        rows = read(results)
    except ValueError as error:
        console.print(str(error))
        raise typer.Exit(1) from error
    results.parent.mkdir(parents=True, exist_ok=True)
    write(results, rows)
    prepare()
    known = {row.case for row in rows}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("cases", total=len(chosen))
        progress.advance(task, sum(case in known for case in chosen))
        waiting = [case for case in chosen if case not in known]
        for done in isolated(waiting, lambda case, emit: emit(examine(case)), workers, SECONDS, GIGABYTES):
            row = _row(done)
            append(results, row)
            rows.append(row)
            progress.advance(task)
            if row.result != "pass":
                console.print(f"{row.case}: {row.result}: {row.reason}", markup=False, soft_wrap=True)
    wanted = [row for row in rows if row.case in set(chosen)]
    console.print(", ".join(f"{count} {result}" for result, count in Counter(r.result for r in wanted).items()))
    if output is not None:
        output.write_text(table(wanted))


def _chosen(words: list[str], cover: bool) -> list[Case]:
    cases = product()
    for values in FACTORS.values():
        named = [word for word in words if word in values]
        cases = [case for case in cases if not named or set(named) & {*str(case).split("/")}]
    unknown = [word for word in words if not any(word in values for values in FACTORS.values())]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no value of any factor")
    return covering(cases) if cover else cases


def _row(done: Done[Case]) -> Row:
    if done.sent:
        row: Row = done.sent[0]
        return row
    return Row.of(done.job, dict.fromkeys(CHECKS, "-"), "fail", done.ended, done.seconds)


if __name__ == "__main__":
    typer.run(main)
