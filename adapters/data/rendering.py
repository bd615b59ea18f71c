"""How a function call is written as a conversation: what the model reads, and the answer it should give."""

from __future__ import annotations

import json
import re
from typing import Any

from adapters.data.calls import Call
from adapters.data.scoring import plain

SYSTEM = (
    'Answer with one JSON function call: {"name": ..., "arguments": {...}}. Leave out what the request leaves open.'
)


def instruction(call: Call) -> str:
    """The user turn: `name: description`, one line for each parameter, a blank line, the request."""
    lines = [f"{call.name}: {_one_line(call.function['description'])}"]
    for name, schema in call.properties.items():
        optional = "" if name in call.required else ", optional"
        lines.append(f"- {name} ({_type(schema)}{optional}): {_one_line(schema['description'])}")
    return "\n".join([*lines, "", call.request])


def messages(call: Call) -> list[dict[str, str]]:
    """The conversation up to the answer."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction(call)}]


def answer(call: Call) -> str:
    """The reference answer, JSON with the first accepted values.

    An optional argument that may be left out is given only if the request states one of its accepted values.
    """
    arguments = {}
    for name, accepted in call.accepted.items():
        needed = [value for value in accepted if value != ""] if name in call.required else accepted
        value = _choose(needed or accepted, call.request)
        if value is not None:
            arguments[name] = value
    return json.dumps({"name": call.name, "arguments": arguments}, ensure_ascii=False)


def _choose(accepted: list[Any], request: str) -> Any:
    """The value to teach, or None where the argument is left out."""
    values = [value for value in accepted if value != ""]
    if "" not in accepted:
        return _first(values[0], request) if values else []
    stated = [value for value in values if _states(request, value)]
    return _first(stated[0], request) if stated else None


def _first(value: Any, request: str) -> Any:
    """`value` with the lists of accepted values inside it resolved: below the top level, dictionaries hold such."""
    if isinstance(value, dict):
        chosen = {k: _choose(v, request) if isinstance(v, list) else v for k, v in value.items()}
        return {k: v for k, v in chosen.items() if v is not None}
    if isinstance(value, list):
        return [_first(item, request) for item in value]
    return value


def _states(request: str, value: Any) -> bool:
    """Whether the request contains the value, compared with the benchmark's leniency."""
    if isinstance(value, list):
        return bool(value) and all(_states(request, item) for item in value)
    if isinstance(value, bool | dict) or value is None:
        return False  # the word true in a sentence says nothing about a flag
    if isinstance(value, int | float):
        return float(value) in map(float, re.findall(r"\d+(?:\.\d+)?", request.replace(",", "")))
    return bool(plain(value)) and plain(value) in plain(request)


def _type(schema: Any) -> str:
    inner = schema.get("items", {}).get("type")
    return f"{schema['type']} of {inner}" if inner else str(schema["type"])


def _one_line(text: str) -> str:
    return " ".join(text.split())
