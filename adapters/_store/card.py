"""`README.md` of an adapter folder: a model card that the Hub can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapters._store.bundle import Bundle, method_record

MARK = "<!-- written by adapters; a file without this line is never replaced -->"


def ours(existing: bytes | None) -> bool:
    """Whether a README may be replaced: there is none, or it is one that we wrote."""
    return existing is None or MARK.encode() in existing


def card(bundle: Bundle, parameters: int, base_name: str | None, peft: str) -> bytes:
    """The text of the card: what the adapter is, how to load it, what is known of its training."""
    front = ["---", "library_name: adapters", "tags:", "- adapter", f"- {json.dumps(bundle.method.name)}"]
    if base_name and "/" in base_name:  # an embedded model's name means nothing to the Hub
        front.append(f"base_model: {json.dumps(base_name)}")
    base = bundle.base or {}
    shown = base_name or base.get("class", "the base model")
    lines = [
        *front,
        "---",
        MARK,
        f"# {cell(bundle.name)}",
        "",
        f"An adapter ({bundle.method.name}, {parameters:,} parameters) for {shown}.",
        "It holds only the trained tensors; the base model is loaded beside it and stays as it is.",
        "",
        "```python",
        "import adapters",
        "",
        f"model, tokenizer = adapters.load_base({json.dumps(base_name or '<the base model>')})",
        'adapters.load(model, "<this folder>")',
        "```",
        "",
        f"Stock PEFT can {'also read this folder' if peft == 'written' else f'not read this folder: {peft}'}.",
        "",
        *table("Method", _fields(bundle)),
        *table("Training", bundle.training),
        *table("Written with", bundle.versions),
    ]
    return ("\n".join(lines).rstrip() + "\n").encode()


def composition_card(name: str, selection: str) -> bytes:
    """The text of the card of a composition."""
    lines = [
        *["---", "library_name: adapters", "tags:", "- adapter", "---", MARK, f"# {cell(name)}", ""],
        f"A composition of adapters, {cell(selection)}, with its parts in the folders below.",
        "",
        "```python",
        "import adapters",
        "",
        'adapters.load(model, "<this folder>")',
        "```",
    ]
    return ("\n".join(lines) + "\n").encode()


def _fields(bundle: Bundle) -> dict[str, Any]:
    fields: dict[str, Any] = method_record(bundle.method)["fields"]
    return fields


def table(title: str, rows: Mapping[str, Any]) -> list[str]:
    """Lines of a section with a table of two columns; none without rows."""
    if not rows:
        return []
    body = [f"| {cell(str(key))} | {cell(str(value))} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *body, ""]


def cell(text: str) -> str:
    """Text that fits into a cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())[:300]
