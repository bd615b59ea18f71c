"""What an adapter folder holds, read and checked, before it meets a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from adapters._contract import Key, KeyValueSite, Method, Site, StreamSite, WeightSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._finite import finite
from adapters._registry import get

CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter.json", "README.md"
OWNED = (WEIGHTS, CONFIG, RECORD, CARD)
KINDS: dict[str, type[WeightSite] | type[StreamSite] | type[KeyValueSite]] = {
    site.kind: site for site in (WeightSite, StreamSite, KeyValueSite)
}


@dataclass(frozen=True)
class Bundle:
    """One adapter: its method, sites, trained heads and tensors, keyed `{site.path}:{tensor}`, `{head}:head.{name}`."""

    name: str
    method: Method
    sites: tuple[Site, ...]
    tensors: Mapping[str, Tensor]
    head: tuple[str, ...] = ()
    base: Mapping[str, Any] | None = None  # None: the folder carries no record of its base
    facts: Mapping[str, Any] = field(default_factory=dict)  # the adapter's own: what a prefix started from
    training: Mapping[str, Any] = field(default_factory=dict)  # the caller's: data, steps, metrics
    labels: Mapping[str, str] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    notes: tuple[str, ...] = ()


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses tensors that hold NaN or infinity; `where` begins the sentence."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise DamagedAdapter(f"{where}: the tensor {key} holds values that are not finite.")


def site_record(site: Site) -> dict[str, Any]:
    """A site as JSON: its fields and its kind."""
    return {"kind": site.kind, **vars(site)}


def site_of(record: Any) -> Site:
    """The site that `site_record` wrote.

    Raises:
        DamagedAdapter: a field is missing, unknown or of another type.
    """
    fields = dict(record) if isinstance(record, dict) else {}
    cls = KINDS.get(fields.pop("kind", ""))
    if cls is None or set(fields) != {f.name for f in dataclasses.fields(cls)}:
        raise DamagedAdapter(f"{RECORD} describes a site that this version does not know.")
    if "aliases" in fields:
        fields["aliases"] = tuple(fields["aliases"]) if isinstance(fields["aliases"], list) else None
    for f in dataclasses.fields(cls):
        if not _fits(fields[f.name], str(f.type)):
            raise DamagedAdapter(f"{RECORD}: the field {f.name} of a site is {fields[f.name]!r}, not {f.type}.")
    return cls(**fields)


def _fits(value: Any, annotation: str) -> bool:
    if annotation.startswith("tuple"):
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if annotation == "Key":
        return isinstance(value, get_args(Key)) and not isinstance(value, bool)
    if annotation.startswith("Literal"):
        return isinstance(value, str) and repr(value) in annotation.replace('"', "'")
    known = {"str": str, "int": int, "bool": bool, "None": type(None)}
    return type(value) in [known[part] for part in annotation.split(" | ")]


def method_record(method: Method) -> dict[str, Any]:
    """A method as JSON: its registered name and its fields; mappings, whose order counts, as pairs."""
    fields = dataclasses.asdict(method)
    pairs = {key: [list(pair) for pair in value.items()] for key, value in fields.items() if isinstance(value, Mapping)}
    return {"name": method.name, "fields": fields | pairs}


def method_of(record: Any) -> Method:
    """The method that `method_record` wrote.

    Raises:
        AdapterError: no such method is installed, or it has other fields than those recorded.
    """
    if not isinstance(record, dict) or set(record) != {"name", "fields"} or not isinstance(record["fields"], dict):
        raise DamagedAdapter(f"{RECORD} does not describe a method.")
    cls, fields = get(str(record["name"])), record["fields"]
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    if not set(fields) <= known:
        unknown = ", ".join(sorted(set(fields) - known))
        raise AdapterError(f"the installed method {cls.name!r} does not know the recorded hyperparameter {unknown}.")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except TypeError as error:
        raise AdapterError(
            f"the installed method {cls.name!r} refuses the recorded hyperparameters: {error}."
        ) from error
