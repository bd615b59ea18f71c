"""`adapters sites`: where a model can be adapted."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.cli.refusal import Json, Quantize, print_json, refusing


@refusing
def list_sites(
    model: Annotated[str, typer.Argument(help="An embedded name, a Hub id or a folder.")],
    explain: Annotated[
        str | None, typer.Option(help="A weight or module, or a glob: why it is a site or not, its role, and the rule.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="causal, masked, classifier or encoder.")] = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Show where a model can be adapted: weights with their roles, streams, attentions, and what is left out.

    Examples:

      adapters sites smollm2-135m-instruct

      adapters sites smollm2-135m-instruct --explain model.layers.0.mlp.gate_proj
    """
    import adapters
    from adapters._hub.quiet import quiet

    with quiet():
        loaded, _ = adapters.load_base(model, quantize=quantize, kind=kind)  # type: ignore[arg-type]
        if explain is not None:
            text = adapters.explain(loaded, explain)
        else:
            found = adapters.sites(loaded)
    if explain is not None:
        if as_json:
            print_json({"path": explain, "explanation": text.splitlines()})
        else:
            typer.echo(text)
        return
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
