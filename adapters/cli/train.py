"""`adapters train`: a recipe from start to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapters.cli.refusal import Json, print_json, refusing

Recipe = Annotated[Path, typer.Argument(help="A YAML recipe, such as recipes/quickstart.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one key, such as training.steps=30. Repeatable.")]
Method = Annotated[str | None, typer.Option(help="Another method, such as prefix; see `adapters methods`.")]
Output = Annotated[Path | None, typer.Option(help="Folder of the adapter, in place of the recipe's.")]


@refusing
def train_recipe(
    recipe: Recipe,
    method: Method = None,
    settings: Set = None,
    output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove the checkpoints of a run that ended early.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter, score it beside the base on held-out rows, save it, and check it in a fresh base.

    Before the first step the run is tried out (see `adapters doctor`); a failed check ends it. A run of more than
    training.save_steps steps keeps checkpoints beside the adapter until it has succeeded.

    Examples:

      adapters train recipes/quickstart.yaml

      adapters train recipes/quickstart.yaml --method qlora --set training.steps=30 --output out/mine

      adapters train recipes/instruct.yaml --set data.path=rows.jsonl --resume
    """
    from rich.console import Console

    from adapters.train import read_recipe

    read = read_recipe(recipe, method, settings or ())
    from adapters.train.run import train

    outcome = train(read, output, Console(stderr=as_json), resume=resume, restart=restart)
    if as_json and outcome is not None:
        print_json(outcome.as_dict())
