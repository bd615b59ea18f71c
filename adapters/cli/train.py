"""`adapters train`: a recipe from start to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapters.cli.refusal import Json, print_json, refusing

Recipe = Annotated[Path, typer.Argument(help="A YAML recipe, such as recipes/quickstart.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one key, such as training.steps=30. Repeatable.")]


@refusing
def train_recipe(
    recipe: Recipe,
    method: Annotated[str | None, typer.Option(help="Another method, such as prefix; see `adapters methods`.")] = None,
    settings: Set = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the adapter, in place of the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter, score it beside the base on held-out rows, save it, and check it in a fresh base.

    Examples:

      adapters train recipes/quickstart.yaml

      adapters train recipes/quickstart.yaml --method qlora --set training.steps=30 --output out/mine
    """
    from rich.console import Console

    from adapters.train import read_recipe

    read = read_recipe(recipe, method, settings or ())
    from adapters.train.run import train

    outcome = train(read, output, Console(stderr=as_json))
    if as_json:
        print_json(outcome.as_dict())
