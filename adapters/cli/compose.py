"""`adapters compose`: one adapter out of several, folder to folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from adapters._errors import AdapterError
from adapters.cli.refusal import Json, print_json, refusing


@refusing
def compose_adapters(
    output: Annotated[Path, typer.Argument(help="Folder of the new adapter.")],
    parts: Annotated[
        list[str],
        typer.Argument(help="FOLDER=WEIGHT of each adapter, as out/fr=0.3; no weight in a stack or split."),
    ],
    how: Annotated[
        str, typer.Option(help="cat, svd, linear, ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Rank of the result, where `how` approximates.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of elements that ties and its kind keep.")] = None,
    majority: Annotated[str, typer.Option(help="How ties votes on a sign: total (by size) or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="Of the random choice that dare makes.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the new adapter; the folder's unless given.")] = None,
    stack: Annotated[bool, typer.Option("--stack", help="Keep the parts: one after the other.")] = False,
    average: Annotated[bool, typer.Option("--average", help="Keep the parts: their weighted average.")] = False,
    split: Annotated[list[int] | None, typer.Option(help="Keep the parts: tokens at which the next begins.")] = None,
    as_json: Json = False,
) -> None:
    """Combine saved adapters of one base into a new one, and say how near it is; no base is loaded.

    With --stack, --average or --split nothing is combined: the parts are kept, and act together when they are loaded.

    Examples:

      adapters compose out/both out/fr=0.3 out/formal=0.7 --how svd --rank 16

      adapters compose out/both out/fr out/formal --stack
    """
    if stack or average or split:
        _keep_parts(output, parts, name, (stack, average, split), as_json)
        return
    from adapters._algebra.folders import combine_folders
    from adapters._algebra.ways import OF_ELEMENTS, Way
    from adapters._hub.quiet import quiet

    weights = _weights(parts)
    if any(Path(folder).resolve() == output.resolve() for folder in weights):
        raise AdapterError(f"{output} is one of the adapters to combine: give another folder.")
    way = Way(how, rank, density, majority, seed)
    with quiet() if how in OF_ELEMENTS else nullcontext():  # PEFT's functions, whose import brings notices along
        report = combine_folders(output, weights, way, name)
    if as_json:
        print_json({"output": str(output), "error": report.error, **asdict(report)})
    else:
        typer.echo(f"{report}\nwritten to {output}")


def _keep_parts(
    output: Path, parts: list[str], name: str | None, kinds: tuple[bool, bool, list[int] | None], as_json: bool
) -> None:
    from adapters._store.composing import compose_folders

    stack, average, split = kinds
    if stack + average + bool(split) > 1:
        raise AdapterError("give one of --stack, --average and --split.")
    weights = _weights(parts) if average else None
    folders = parts if weights is None else list(weights)
    values = None if weights is None else list(weights.values())
    report = compose_folders(output, folders, name or output.name, values, split)
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(report)


def _weights(parts: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        folder, equals, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            equals = ""
        if not equals or not folder:
            raise AdapterError(f"{part} is not FOLDER=WEIGHT; write it as out/fr=0.3.")
        if folder in found:
            raise AdapterError(f"{folder} is given twice: add its weights up.")
        found[folder] = value
    return found
