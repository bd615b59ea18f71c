"""Whether two adapters were made for one base, by what their records say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters._errors import WrongBase
from adapters._store import fingerprints
from adapters._store.bundle import Bundle
from adapters._store.compare import Difference, compare
from adapters._store.sample import restore


def bases_apart(a: Bundle, b: Bundle) -> str:
    """Why the recorded bases are not one, or nothing; where either has no record nothing is known.

    Weights below the heads of either are left out: a fingerprint has none of its adapter's own.
    """
    if a.base is None or b.base is None:
        return ""
    for key, what in (("class", "class"), ("model_type", "model type")):
        if a.base[key] != b.base[key]:
            return f"the recorded bases have the {what} {a.base[key]!r} and {b.base[key]!r}."
    heads = tuple(f"{head}." for head in (*a.head, *b.head))
    here, there = _entries(a.base, heads), _entries(b.base, heads)
    alone = sorted(here.keys() ^ there.keys())
    if alone:
        return f"only one of the recorded bases has {alone[0]}."
    found = []
    for path, entry in here.items():
        old, new = restore(dict(entry), path), restore(dict(there[path]), path)
        if old.comparable and new.comparable and old.shape != new.shape:
            return f"{path} has the shape {list(old.shape)} in one recorded base and {list(new.shape)} in the other."
        if entry["sampled"] and there[path]["sampled"]:
            found.append(compare(path, old, new))
    return _judged([difference for difference in found if difference is not None])


def without(base: Mapping[str, Any], heads: tuple[str, ...]) -> dict[str, Any]:
    """A record of a base without the weights of modules that are an adapter's own."""
    return {**base, "parameters": dict(_entries(base, tuple(f"{head}." for head in heads)))}


def _entries(base: Mapping[str, Any], left_out: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    return {path: entry for path, entry in base["parameters"].items() if not (left_out and path.startswith(left_out))}


def _judged(differences: list[Difference]) -> str:
    try:
        fingerprints._judge(differences)
    except WrongBase as error:
        return str(error)
    return ""
