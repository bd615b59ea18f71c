"""What an adapter folder holds, read and checked, before it meets a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapters._attach import Tokens
from adapters._contract import Method, Site
from adapters._errors import AdapterError, DamagedAdapter
from adapters._finite import finite
from adapters._registry import get
from adapters._sites import SiteMap

CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter.json", "README.md"
PARTS = "adapter_parts.json"  # of a composition: what it is made of, in folders below
LARGEST_CONFIG = 16 << 20  # bytes of an adapter_config.json, or of its like from others
OWNED = (WEIGHTS, CONFIG, RECORD, CARD, PARTS)


@dataclass(frozen=True, eq=False, repr=False)
class Bundle:
    """One adapter: its method, sites, trained heads, tokens and tensors, under the names that `tensors_of` gives.

    What `adapters.read` returns: a folder kept in memory, which `adapters.load` and `adapters.swap` take in its place.
    """

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
    map: SiteMap | None = None  # every site of the base
    tokens: Tokens | None = None  # whose rows it trains
    notes: tuple[str, ...] = ()
    folder: str = ""  # where it was read from
    digest: str = ""  # the record's own, which covers the other files; SHA-256 of the files where PEFT wrote them
    base_digest: str = ""  # of the text of `base`, where it was read from a folder
    seen: int | None = None  # `versions(tensors)` when their values were looked at; None: they were not

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def __repr__(self) -> str:
        return f"Bundle({self.name!r}, {self.method!r}, {self.parameters:,} parameters at {len(self.sites)} sites)"


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses tensors that hold NaN or infinity; `where` begins the sentence."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise DamagedAdapter(f"{where}: the tensor {key} holds values that are not finite.")


def versions(tensors: Mapping[str, Tensor]) -> int | None:
    """A number that grows with every in-place change of any of the tensors; None where torch does not count them."""
    if any(tensor.is_inference() for tensor in tensors.values()):
        return None
    return sum(tensor._version for tensor in tensors.values())


def method_record(method: Method) -> dict[str, Any]:
    """A method as JSON: its registered name and its fields; mappings, whose order counts, as pairs."""
    fields = dataclasses.asdict(method)
    pairs = {key: [list(pair) for pair in value.items()] for key, value in fields.items() if isinstance(value, Mapping)}
    return {"name": method.name, "fields": fields | pairs}


def tokens_record(tokens: Tokens | None) -> dict[str, Any] | None:
    """The tokens whose rows an adapter trains, as JSON."""
    return None if tokens is None else {key: list(value) for key, value in dataclasses.asdict(tokens).items()}


def tokens_of(record: Any) -> Tokens | None:
    """The tokens that `tokens_record` wrote.

    Raises:
        DamagedAdapter: it wrote no such thing.
    """
    if record is None:
        return None
    kinds = {"ids": int, "texts": str, "tables": str}
    if not isinstance(record, dict) or set(record) != set(kinds):
        raise DamagedAdapter(f"{RECORD} does not describe tokens.")
    for key, kind in kinds.items():
        if not isinstance(record[key], list) or not all(type(value) is kind for value in record[key]):
            raise DamagedAdapter(f"{RECORD} does not describe tokens: {key} is not a list of {kind.__name__}.")
    found = Tokens(**{key: tuple(values) for key, values in record.items()})
    ascending = all(low < high for low, high in zip((-1, *found.ids), found.ids, strict=False))
    if not found.ids or not ascending or len(found.texts) != len(found.ids) or not found.tables:
        raise DamagedAdapter(f"{RECORD} does not describe tokens: their ids do not ascend, or others are missing.")
    return found


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
