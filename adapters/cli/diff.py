"""`adapters diff`: how two saved adapters differ, site by site."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.cli.refusal import Json, print_json, refusing

TOTALS = ("size_a", "size_b", "difference", "cosine", "outputs", "inputs")


@refusing
def diff_adapters(
    a: Annotated[str, typer.Argument(help="A saved adapter: a folder or a Hub id.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    picture: Annotated[Path | None, typer.Option(help="Also draw a page of heat maps into this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two adapters site by site: sizes, angle, overlap of the subspaces they work in; no base is needed.

    Example:  adapters diff out/fr out/de --picture out/diff.png
    """
    import adapters

    report = adapters.diff(a, b)
    if picture is not None:
        report.save_picture(picture)
    if as_json:
        print_json(_plain({**asdict(report), "total": {field: getattr(report, field) for field in TOTALS}}))
    else:
        typer.echo(f"{report}" + ("" if picture is None else f"\ndrawn into {picture}"))


def _plain(value: Any) -> Any:
    """NaN, which JSON has not, as null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
