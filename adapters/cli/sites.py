"""`adapters sites`: where a model can be adapted."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.cli.refusal import Json, Quantize, print_json, refusing


@refusing
def list_sites(
    model: Annotated[str, typer.Argument(help="An embedded name, a Hub id or a folder.")],
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Show where a model can be adapted: weights with their roles, streams, attentions, and what is left out.

    Example:  adapters sites smollm2-135m-instruct
    """
    import adapters
    from adapters._hub.quiet import quiet

    with quiet():
        loaded, _ = adapters.load_base(model, quantize=quantize)
        found = adapters.sites(loaded)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
