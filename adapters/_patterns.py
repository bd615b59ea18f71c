"""Hyperparameters that differ from site to site: values by pattern over sites, of which the first that matches holds.

A pattern is what `targets` accepts: a role, a glob over roles, a path, the end of a path, a glob over paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from adapters._contract import Site, require
from adapters._errors import AdapterError, nearest
from adapters._sites.select import matches

V = TypeVar("V")


def checked(field: str, given: Any, valid: Callable[[Any], bool], wanted: str) -> dict[str, Any]:
    """The patterns of a field as a dictionary of its own, also from the pairs that a record holds.

    Raises:
        AdapterError: a key is not a text, or a value is not `valid`; the sentence says what is `wanted`.
    """
    try:
        patterns = dict(given)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{field} is {given!r}; it maps targets to values, as {{'mlp.*': 4}}.") from error
    for key, value in patterns.items():
        require(isinstance(key, str), f"{field} has the key {key!r}; its keys are targets, such as 'mlp.*'.")
        require(valid(value), f"{field} gives {key!r} the value {value!r}; it must be {wanted}.")
    return patterns


def value_at(patterns: Mapping[str, V], site: Site, usual: V) -> V:
    """The value of the first pattern that matches the site, or the usual one."""
    return next((value for pattern, value in patterns.items() if matches(pattern, site)), usual)


def require_matches(field: str, patterns: Iterable[str], sites: Sequence[Site]) -> None:
    """Refuses a pattern that means none of the chosen sites, with the nearest that would.

    Raises:
        AdapterError: as said.
    """
    for pattern in patterns:
        if not any(matches(pattern, site) for site in sites):
            roles = sorted({site.role for site in sites})
            paths = [site.path.removesuffix(".weight") for site in sites]
            words = [*roles, *(path.rpartition(".")[2] for path in paths), *paths]
            raise AdapterError(
                f"{field} has the key {pattern!r}, which matches none of the {len(sites)} chosen sites"
                f"{nearest(pattern, words)}; roles here: {', '.join(roles)}"
            )
