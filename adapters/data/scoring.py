"""Scores a function call by the rules of the benchmark's own checker (bfcl-eval 2026.3.23, `ast_checker.py`)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from adapters.data.calls import Call

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}


@dataclass(frozen=True)
class Score:
    """How far an answer is a call of the right function, each mark including those before it."""

    valid: bool
    complete: bool
    exact: bool


def score(text: str, call: Call) -> Score:
    """Scores one generated answer.

    valid: the whole text is one JSON object with just `name` and `arguments`, the name is the function's, and no
    argument is one that it does not have.
    complete: valid, every required argument is there, and each has the declared type (or that of an accepted value).
    exact: complete, and every value is an accepted one; text is compared without case, spaces and `,./-_*^`.
    """
    try:
        said = json.loads(text.strip())
    except (ValueError, RecursionError):
        return Score(False, False, False)
    if not isinstance(said, dict) or set(said) != {"name", "arguments"} or said["name"] != call.name:
        return Score(False, False, False)
    arguments = said["arguments"]
    if not isinstance(arguments, dict) or not set(arguments) <= set(call.properties):
        return Score(False, False, False)
    typed = all(_typed(value, call.properties[name], call.accepted.get(name, [])) for name, value in arguments.items())
    if not typed or not set(call.required) <= set(arguments):
        return Score(True, False, False)
    return Score(True, True, _arguments_match(arguments, call.accepted))


def plain(text: str) -> str:
    """`text` as the benchmark compares it: lower case, no spaces or `,./-_*^`, double quotes."""
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _typed(value: Any, schema: Any, accepted: list[Any]) -> bool:
    declared: type = _TYPES[schema["type"]]
    if declared is float and type(value) is int:
        return True
    if type(value) is declared:
        if not isinstance(value, list):
            return True
        inner = _TYPES.get(schema.get("items", {}).get("type", ""))
        return inner is None or all(type(item) is inner or (inner, type(item)) == (float, int) for item in value)
    # the benchmark accepts a variable's name where a value is expected, if that is what its answers hold
    return any(type(value) is type(answer) for answer in accepted if answer != "")


def _arguments_match(arguments: dict[str, Any], accepted: Any) -> bool:
    """Every argument has an accepted value, and every one left out may be left out."""
    if not all(name in accepted and _value_matches(value, accepted[name]) for name, value in arguments.items()):
        return False
    return all("" in _listed(values) for name, values in accepted.items() if name not in arguments)


def _value_matches(value: Any, accepted: Any) -> bool:
    return any(_same(value, answer) for answer in _listed(accepted))


def _listed(accepted: Any) -> list[Any]:
    """Three levels down the benchmark's answers hold a plain value in place of a list of accepted ones."""
    return accepted if isinstance(accepted, list) else [accepted]


def _same(value: Any, answer: Any) -> bool:
    if isinstance(value, str):
        return isinstance(answer, str) and plain(value) == plain(answer)
    if isinstance(value, dict):
        return isinstance(answer, dict) and _arguments_match(value, answer)
    if isinstance(value, list):
        matching = isinstance(answer, list) and len(value) == len(answer)
        return matching and all(_same(a, b) for a, b in zip(value, answer, strict=True))
    return bool(value == answer) and isinstance(value, bool) == isinstance(answer, bool)
