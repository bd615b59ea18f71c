"""`adapters inspect`: what an adapter folder holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from adapters.cli.refusal import Json, print_json, refusing


@refusing
def inspect_adapter(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: a folder or a Hub id.")],
    base: Annotated[
        str | None, typer.Option(help="Also compare this base with the one recorded: a name, a Hub id or a folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter folder holds, after verifying every tensor in it; no base is needed.

    Example:  adapters inspect out/function-calls-lora
    """
    import adapters

    info = adapters.inspect(adapter)
    compared = None if base is None else _compared(adapter, base)
    if as_json:
        print_json(asdict(info) | ({} if compared is None else {"compared": compared}))
    else:
        typer.echo(str(info) if compared is None else f"{info}\n  compared {compared}")


def _compared(adapter: str, base: str) -> str:
    """How a base was found to be the recorded one; refused where it is not."""
    import adapters
    from adapters._hub.quiet import quiet
    from adapters._store.basecheck import UNRECORDED
    from adapters._store.verdicts import same_base

    with quiet():
        model, _ = adapters.load_base(base)
        bundle = adapters.read(adapter, model)
        if bundle.base is None:
            return UNRECORDED
        return same_base(bundle.base, bundle.base_digest, model, exclude=bundle.head)
