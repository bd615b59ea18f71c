"""`adapters doctor`: everything that a recipe's run does before its first step."""

from __future__ import annotations

from dataclasses import asdict

import typer

from adapters.cli.refusal import Json, print_json, refusing
from adapters.cli.train import Method, Output, Recipe, Set


@refusing
def examine_recipe(
    recipe: Recipe,
    method: Method = None,
    settings: Set = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Try a recipe out before hours are spent on it: load, attach, read the rows, run the first ones.

    Checks that something is learned, the end of a turn among it, that every tensor of the adapter gets a gradient, that
    learning rate and schedule suit the method, that tokenizer and base agree, that the results fit on the disk. Nothing
    is written. Exit code 0: passed, perhaps with warnings; 1: failed.

    Examples:

      adapters doctor recipes/quickstart.yaml

      adapters doctor recipes/instruct.yaml --set data.path=rows.jsonl --method prefix --json
    """
    from rich.console import Console

    from adapters.train import read_recipe

    read = read_recipe(recipe, method, settings or ())
    from adapters.train.run import examine

    found = examine(read, output, Console(stderr=as_json))
    if as_json:
        print_json({"passed": found.passed, **asdict(found)})
    if not found.passed:
        raise typer.Exit(1)
