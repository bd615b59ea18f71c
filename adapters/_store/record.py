"""`adapter.json`: the record of an adapter, written so that one flipped bit anywhere in the folder's files is seen.

The JSON has one canonical text (sorted keys, ASCII) and holds the SHA-256 of that text with the digest left empty, and
of every other file of the adapter. Nothing in it is ever executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters._contract import Site
from adapters._errors import DamagedAdapter
from adapters._sites import SiteMap, site_of, site_record
from adapters._store import lines, weights
from adapters._store.bundle import (
    CONFIG,
    RECORD,
    WEIGHTS,
    Bundle,
    method_of,
    method_record,
    tokens_of,
    tokens_record,
)
from adapters._store.commit import View
from adapters._store.frozen import Frozen, known

FORMAT, READABLE = 3, (1, 2, 3)
READABLE_TEXTS = {b"%d" % number: number for number in READABLE}
SINCE = {"map": 2, "tokens": 3}  # the fields that earlier formats had not
LARGEST_RECORD = 256 << 20  # bytes; a record of 100,000 tensors takes 30 MB
KEYS = {"format", "name", "method", "sites", "head", "labels", "base", "tensors", "files", "versions", "facts"} | {
    "training",
    "created",
    "map",
    "tokens",
    "digest",
}
SHARED = {"base", "sites", "map", "tensors"}  # siblings have them in common, digests apart


def encode(bundle: Bundle, file_keys: Mapping[str, str], config: bytes | None, content: bytes) -> bytes:
    """The text of `adapter.json`. `file_keys` maps our tensor names to those in the safetensors file."""
    files = {WEIGHTS: content, **({CONFIG: config} if config is not None else {})}
    tensors = {
        key: {
            "file_key": file_keys[key],
            "dtype": weights.name_of(tensor.dtype),
            "shape": list(tensor.shape),
            "sha256": sha(_raw(tensor)),
        }
        for key, tensor in bundle.tensors.items()
    }
    record: dict[str, Any] = {
        "format": FORMAT,
        "name": bundle.name,
        "method": method_record(bundle.method),
        "sites": [site_record(site) for site in bundle.sites],
        "head": list(bundle.head),
        "labels": bundle.labels,
        "base": bundle.base,
        "tensors": tensors,
        "files": {name: {"bytes": len(raw), "sha256": sha(raw)} for name, raw in files.items()},
        "versions": dict(bundle.versions),
        "facts": dict(bundle.facts),
        "training": dict(bundle.training),
        "created": bundle.created,
        "map": bundle.map.to_dict() if bundle.map is not None else None,
        "tokens": tokens_record(bundle.tokens),
        "digest": "",
    }
    raw = lines.text(record)
    return lines.sealed(raw, sha(raw))


def decode(view: View, check: bool = True) -> Bundle:
    """The adapter that a folder with an `adapter.json` holds, every digest, shape and value checked.

    Args:
        check: False leaves the digests out and lets NaN and infinity pass; everything else is still checked.

    Raises:
        DamagedAdapter: anything differs from what was written; the sentence names the file.
    """
    text, record = _record(view, check)
    stored = weights.unpack(_files(view, record["files"], check))
    tensors = weights.matched(stored, lines.without_digests(text["tensors"]))
    if check:
        stored.require_finite()
    base, base_digest = known.get("base", text["base"], _base)
    return Bundle(
        name=_typed(record, "name", str),
        method=method_of(record["method"]),
        sites=known.get("sites", text["sites"], _sites),
        tensors=tensors,
        head=tuple(str(path) for path in _typed(record, "head", list)),
        base=base,
        digest=_typed(record, "digest", str),
        base_digest=base_digest,
        facts=_typed(record, "facts", dict),
        training=_typed(record, "training", dict),
        labels=record["labels"],
        versions=_typed(record, "versions", dict),
        created=_typed(record, "created", str),
        map=known.get("map", text["map"], _map) if "map" in text else None,
        tokens=tokens_of(record.get("tokens")),
    )


def _record(view: View, check: bool) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The text of every field, and the values of those in which siblings differ."""
    if view.size(RECORD) > LARGEST_RECORD:
        raise DamagedAdapter(f"{RECORD} has {view.size(RECORD):,} bytes, more than any adapter's record needs.")
    raw = view[RECORD]
    text = lines.split(raw)
    number = READABLE_TEXTS.get(text.get("format", b"")) if text is not None else None
    if text is None or number is None or text.keys() != KEYS - {key for key, since in SINCE.items() if since > number}:
        raise _refusal(raw)
    record = {key: lines.value_of(line) for key, line in text.items() if key not in SHARED}
    if check and lines.digest(raw, text["digest"]) != record["digest"]:
        raise DamagedAdapter(f"{RECORD} was altered after it was written: its digest does not match.")
    return text, record


def _refusal(raw: bytes) -> DamagedAdapter:
    """What is wrong with a text that this version would not have written."""
    try:
        record = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError):
        return DamagedAdapter(f"{RECORD} is not the JSON that was written: it is truncated or damaged.")
    have = record.get("format") if isinstance(record, dict) else None
    if have not in READABLE:
        return DamagedAdapter(f"{RECORD} has the format {str(have)[:20]!r}; this version reads formats up to {FORMAT}.")
    return DamagedAdapter(lines.ALTERED)


def _base(line: bytes) -> tuple[Frozen, str]:
    return Frozen(_typed({"base": lines.value_of(line)}, "base", dict)), sha(line)


def _sites(line: bytes) -> tuple[Site, ...]:
    return tuple(map(site_of, _typed({"sites": lines.value_of(line)}, "sites", list)))


def _map(line: bytes) -> SiteMap | None:
    value = lines.value_of(line)
    return SiteMap.from_dict(value) if value is not None else None


def _files(view: View, expected: Any, check: bool) -> weights.File:
    """The safetensors file, when every file is the one that was written."""
    if not isinstance(expected, dict) or WEIGHTS not in expected or not set(expected) <= {WEIGHTS, CONFIG}:
        raise DamagedAdapter(f"{RECORD} names other files than an adapter has.")
    if CONFIG in view and CONFIG not in expected:
        raise DamagedAdapter(f"{CONFIG} does not belong to this adapter: {RECORD} does not know it.")
    if not all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in expected.values()):
        raise DamagedAdapter(f"{RECORD} does not describe the files of an adapter.")
    for name, entry in expected.items():
        if name not in view:
            raise DamagedAdapter(f"{name} is missing.")
        if view.size(name) != entry["bytes"]:
            raise DamagedAdapter(f"{name} has {view.size(name):,} bytes instead of {entry['bytes']:,}.")
    file = weights.read(view)
    for name, entry in expected.items() if check else ():
        if (file.digest() if name == WEIGHTS else sha(view[name])) != entry["sha256"]:
            raise DamagedAdapter(f"{name} was altered after it was written: its digest does not match.")
    return file


def json_safe(value: Any) -> Any:
    """Facts as JSON: dataclasses become dictionaries; what JSON cannot hold becomes its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_safe(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    finite = not isinstance(value, float) or value - value == 0
    return value if isinstance(value, str | int | float | bool | None) and finite else str(value)


def _typed(record: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(record[key], kind):
        raise DamagedAdapter(f"{RECORD}: {key} is not a {kind.__name__}.")
    return record[key]


def sha(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
