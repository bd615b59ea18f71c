"""`adapters check`: what another program will make of an adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from adapters.cli.refusal import Json, print_json, refusing


@refusing
def check_adapter(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: a folder or a Hub id.")],
    program: Annotated[str, typer.Option("--for", help="peft, vllm, llama.cpp, mistralrs or mlx.")],
    as_json: Json = False,
) -> None:
    """Say what a program will accept of an adapter, refuse or leave out, and what to change; no base is needed.

    Exit code 1 means that it does not work as it is.

    Example:  adapters check out/function-calls-lora --for vllm
    """
    import adapters

    found = adapters.check_for(adapter, program)
    if as_json:
        print_json({**asdict(found), "works": found.works})
    else:
        typer.echo(str(found))
    if not found.works:
        raise typer.Exit(1)
