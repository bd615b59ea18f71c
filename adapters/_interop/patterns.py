"""Values that differ from module to module, as PEFT writes them (regular expressions that end a path) and as we do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

V = TypeVar("V", int, float)


def pattern_value(patterns: Mapping[str, Any], path: str, usual: Any) -> Any:
    """The value of the first of PEFT's patterns that ends `path`, or the usual one."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), usual)


def to_peft(values: Mapping[str, V], usual: V) -> dict[str, V] | None:
    """PEFT's pattern for values by module path: full paths of those that are not the usual one.

    None where a path is the end of another, so that PEFT would take one for the other.
    """
    patterns = {path: values[path] for path in sorted(values) if values[path] != usual}
    told_apart = all(pattern_value(patterns, path, usual) == value for path, value in values.items())
    return patterns if told_apart else None


def from_peft(values: Mapping[str, V], usual: V) -> tuple[V, dict[str, V]]:
    """One value for all and exact paths for the others, in the order in which the first that matches holds."""
    if len(set(values.values())) == 1:
        return next(iter(values.values())), {}
    differing = {path for path, value in values.items() if value != usual}
    hidden = {path for path in values if any(path.endswith(f".{end}") for end in differing)}
    return usual, {path: values[path] for path in sorted(differing | hidden, key=len, reverse=True)}
