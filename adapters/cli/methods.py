"""`adapters methods`: what there is to attach."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from adapters.cli.refusal import Json, print_json, refusing


@refusing
def list_methods(as_json: Json = False) -> None:
    """List the methods: those built in, and those of installed plugins.

    Example:  adapters methods --json
    """
    from adapters import methods

    found = [_described(name, methods.get(name), methods.source(name)) for name in methods.names()]
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for column in ("name", "acts on", "merges", "provided by", "formula and fields"):
        table.add_column(column)
    for method in found:
        settings = ", ".join(f"{key}={value!r}" for key, value in method["fields"].items())
        about = Text(f"{method['formula']}\n{settings}")
        table.add_row(
            method["name"], method["kind"], "yes" if method["mergeable"] else "no", method["provided_by"], about
        )
    Console().print(table)


def _described(name: str, cls: Any, source: str) -> dict[str, Any]:
    doc = inspect.getdoc(cls) or ""
    return {
        "name": name,
        "kind": cls.kind,
        "mergeable": cls.mergeable,
        "provided_by": source,
        "formula": " ".join(doc.split("\n\n")[0].split()),
        "fields": {field.name: _default(field) for field in fields(cls)},
    }


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else "required"
