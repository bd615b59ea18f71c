"""The command line `adapters`: one file a command, each a thin layer over the library."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.cli.check import check_adapter
from adapters.cli.compose import compose_adapters
from adapters.cli.diff import diff_adapters
from adapters.cli.doctor import examine_recipe
from adapters.cli.evaluate import evaluate_adapter
from adapters.cli.export import export_adapter
from adapters.cli.generate import generate_text
from adapters.cli.inspect import inspect_adapter
from adapters.cli.merge import merge_adapter
from adapters.cli.methods import list_methods
from adapters.cli.plan import plan_memory
from adapters.cli.publish import publish_adapter
from adapters.cli.sites import list_sites
from adapters.cli.train import train_recipe

_EPILOG = "Exit codes: 0 done, 1 refused with one sentence, 2 wrong usage, 130 interrupted."
app = typer.Typer(
    name="adapters",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _version(asked: bool) -> None:
    if asked:
        import adapters

        typer.echo(f"adapters {adapters.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adapt any Hugging Face model by training a few extra tensors, and ship those tensors alone.

    Start with:  [bold]adapters train recipes/quickstart.yaml[/bold]
    """


for _name, _command in (
    ("methods", list_methods),
    ("sites", list_sites),
    ("plan", plan_memory),
    ("doctor", examine_recipe),
    ("train", train_recipe),
    ("eval", evaluate_adapter),
    ("generate", generate_text),
    ("inspect", inspect_adapter),
    ("merge", merge_adapter),
    ("export", export_adapter),
    ("check", check_adapter),
    ("publish", publish_adapter),
    ("compose", compose_adapters),
    ("diff", diff_adapters),
):
    app.command(_name)(_command)


def main() -> None:
    """Entry point of the console script."""
    app()


__all__ = ["app", "main"]
