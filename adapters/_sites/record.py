"""Sites as JSON values and back, every field's type checked: nothing from a file reaches the model unseen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from adapters._contract import Key, KeyValueSite, LayerSite, Rows, Site, StreamSite, WeightSite
from adapters._errors import DamagedAdapter

KINDS: dict[str, type[WeightSite] | type[StreamSite] | type[KeyValueSite] | type[LayerSite]] = {
    site.kind: site for site in (WeightSite, StreamSite, KeyValueSite, LayerSite)
}
_SCALARS = {"str": str, "int": int, "bool": bool, "None": type(None)}


def site_record(site: Site) -> dict[str, Any]:
    """A site as JSON: its kind, its required fields, and those that differ from their defaults."""
    shown = {
        f.name: getattr(site, f.name)
        for f in dataclasses.fields(site)
        if f.default is dataclasses.MISSING or getattr(site, f.name) != f.default
    }
    return {"kind": site.kind, **{name: _plain(value) for name, value in shown.items()}}


def site_of(record: Any) -> Site:
    """The site that `site_record` wrote.

    Raises:
        DamagedAdapter: a field is missing, unknown or of another type.
    """
    given = dict(record) if isinstance(record, dict) else {}
    cls = KINDS.get(str(given.pop("kind", "")))
    known = {f.name: f for f in dataclasses.fields(cls)} if cls is not None else {}
    missing = [name for name, f in known.items() if f.default is dataclasses.MISSING and name not in given]
    if cls is None or missing or not set(given) <= set(known):
        raise DamagedAdapter("the record describes a site that this version does not know.")
    return cls(**{name: _typed(name, str(known[name].type), value) for name, value in given.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Rows):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def _typed(name: str, annotation: str, value: Any) -> Any:
    """`value` as the field's type, of which JSON knows lists for tuples and objects for records."""
    if annotation == "Rows" and isinstance(value, Mapping) and set(value) == {"layout", "axis"}:
        fields = {f.name: str(f.type) for f in dataclasses.fields(Rows)}
        return Rows(**{key: _typed(f"{name}.{key}", fields[key], each) for key, each in value.items()})
    if annotation.startswith("tuple") and isinstance(value, list | tuple):
        kind = int if "int" in annotation else str
        if all(type(item) is kind for item in value):
            return tuple(value)
    elif annotation == "Key":
        if isinstance(value, get_args(Key)) and not isinstance(value, bool):
            return value
    elif annotation.startswith("Literal"):
        if isinstance(value, str) and repr(value) in annotation.replace('"', "'"):
            return value
    elif type(value) in [_SCALARS[part] for part in annotation.split(" | ") if part in _SCALARS]:
        return value
    raise DamagedAdapter(f"the field {name} of a site is {value!r}, not {annotation}.")
