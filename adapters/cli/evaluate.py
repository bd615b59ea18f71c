"""`adapters eval`: the score of a saved adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from adapters.cli.refusal import Json, print_json, refusing
from adapters.cli.train import Recipe, Set


@refusing
def evaluate_adapter(
    recipe: Recipe,
    adapter: Annotated[str, typer.Argument(help="A saved adapter: a folder or a Hub id.")],
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Score a saved adapter and its base on the recipe's held-out rows.

    Example:  adapters eval recipes/quickstart.yaml out/function-calls-lora
    """
    from rich.console import Console

    import adapters
    from adapters.train import read_recipe

    trained_with = adapters.inspect(adapter).method
    # the variant of the adapter's method says whether the base is in 4 bits
    method = trained_with if trained_with in adapters.methods.names() else None
    read = read_recipe(recipe, method, settings or ())
    from adapters.train.run import evaluate

    scores = evaluate(read, adapter, Console(stderr=as_json))
    if as_json:
        print_json(asdict(scores))
