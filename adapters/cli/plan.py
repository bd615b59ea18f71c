"""`adapters plan`: what a training step will take of memory, before any weight is loaded."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from adapters._errors import AdapterError
from adapters.cli.refusal import Json, print_json, refusing


@refusing
def plan_memory(
    model: Annotated[str, typer.Argument(help="An embedded name, a Hub id or a folder, of which config.json is read.")],
    method: Annotated[str, typer.Option(help="What is trained; see `adapters methods`.")] = "lora",
    memory: Annotated[
        str | None, typer.Option(help="What there is, such as 24GB (10^9 bytes each) or 22.5GiB (2^30 each).")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of a micro-batch.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of its rows, all of them full.")] = 512,
    learned: Annotated[int | None, typer.Option(help="Tokens of a row that have a label; by default all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = None,
    bits: Annotated[int | None, typer.Option(help="4: a base in nf4.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Activations are computed twice, and few are kept.")
    ] = False,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    padded: Annotated[bool, typer.Option("--padded", help="Rows differ in length, so that there is a mask.")] = False,
    kind: Annotated[str | None, typer.Option(help="causal, masked, classifier or encoder.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the method, such as rank=16. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict the peak memory of a training step, and propose other settings where it does not fit.

    The step is run on tensors that have a shape and no memory, by the code that trains: a model of any size is planned
    on any machine. Counted are the bytes of tensors; a GPU's context and its allocator's gaps come on top.

    Examples:

      adapters plan smollm2-135m-instruct --rows 8 --tokens 1024 --memory 4GB

      adapters plan ./llama --method qlora --set rank=16 --tokens 2048 --checkpointing --memory 24GB --json
    """
    import adapters

    found = adapters.plan(
        model,
        method,
        memory=memory,
        rows=rows,
        tokens=tokens,
        learned=learned,
        dtype=dtype,
        bits=bits,
        checkpointing=checkpointing,
        accumulation=accumulation,
        padded=padded,
        kind=kind,
        **_fields(settings or ()),
    )
    if as_json:
        print_json(found.as_dict())
    else:
        typer.echo(str(found))


def _options() -> set[str]:
    import adapters

    named = inspect.signature(adapters.plan).parameters.values()
    return {each.name for each in named if each.kind is not each.VAR_KEYWORD}


def _fields(settings: Any) -> dict[str, Any]:
    """Values as YAML reads them, which is how recipes write them."""
    import yaml

    found = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.isidentifier():
            raise AdapterError(f"--set {setting}: write a field of the method and its value, such as rank=16.")
        if key in _options():
            raise AdapterError(f"--set {setting}: {key} is an argument of this command: see adapters plan --help.")
        found[key] = yaml.safe_load(text)
    return found
