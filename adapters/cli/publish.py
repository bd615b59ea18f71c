"""`adapters publish`: an adapter on the Hub, for others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from adapters.cli.refusal import Json, print_json, refusing


@refusing
def publish_adapter(
    folder: Annotated[Path, typer.Argument(help="A saved adapter.")],
    to: Annotated[str, typer.Option(help="ORG/NAME on the Hub; it is made if there is none.")],
    base: Annotated[str | None, typer.Option(help="The base's name for others; by default the recorded one.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="The adapter's; by default the base's.")] = None,
    base_license: Annotated[
        str | None, typer.Option(help="The base's; by default what its pin or its card on the Hub says.")
    ] = None,
    data_license: Annotated[
        str | None, typer.Option(help="Of what it was trained on; by default what its record says.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the card, send nothing.")] = False,
    no_try: Annotated[
        bool, typer.Option("--no-try", help="Do not run the card's program, which loads the base.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter with a card made of its record, in one commit, after looking for what should stay private.

    Example:  adapters publish out/function-calls-lora --to me/function-calls --dry-run
    """
    import adapters

    report = adapters.publish(
        folder,
        to,
        base=base,
        license=licence,
        base_license=base_license,
        data_license=data_license,
        private=private,
        dry_run=dry_run,
        try_it=not no_try,
    )
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(f"{report.card}\n{report}" if dry_run else str(report))
