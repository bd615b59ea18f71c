"""A plain value of a recipe as the annotated type of its field, or not at all."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

REFUSED = object()


def convert(value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        options = (convert(value, option) for option in get_args(hint))
        return next((option for option in options if option is not REFUSED), REFUSED)
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) else REFUSED
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        listed = isinstance(items, list) and all(isinstance(item, str) for item in items)
        return tuple(items) if listed else REFUSED
    if get_origin(hint) is Mapping:
        return _mapping(value, get_args(hint)[1])
    if hint is Any:
        return value
    if hint is float:
        return _float(value)
    if hint is type(None):
        return None if value is None else REFUSED
    return value if type(value) is hint else REFUSED


def _mapping(value: Any, hint: Any) -> Any:
    named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    items = {key: convert(item, hint) for key, item in value.items()} if named else {"": REFUSED}
    return REFUSED if any(item is REFUSED for item in items.values()) else items


def _float(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text."""
    try:
        return REFUSED if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return REFUSED


def described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(described(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list of texts"
    if get_origin(hint) is Mapping:
        return f"a mapping from names to {described(get_args(hint)[1])}"
    named = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return named.get(hint, str(hint))
