"""`adapters inspect`: what an adapter folder holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from adapters.cli.refusal import Json, print_json, refusing


@refusing
def inspect_adapter(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: a folder or a Hub id.")],
    as_json: Json = False,
) -> None:
    """Show what an adapter folder holds, after verifying every tensor in it; no base is needed.

    Example:  adapters inspect out/function-calls-lora
    """
    import adapters

    info = adapters.inspect(adapter)
    if as_json:
        print_json(asdict(info))
    else:
        typer.echo(str(info))
