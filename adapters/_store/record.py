"""`adapter.json`: the record of an adapter, written so that one flipped bit anywhere in the folder's files is seen.

The JSON has one canonical text (sorted keys, ASCII) and holds the SHA-256 of that text with the digest left empty, and
of every other file of the adapter. Nothing in it is ever executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from math import prod
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adapters._errors import DamagedAdapter
from adapters._sites import site_of, site_record
from adapters._store.bundle import (
    CONFIG,
    RECORD,
    WEIGHTS,
    Bundle,
    method_of,
    method_record,
    require_finite,
    tokens_of,
    tokens_record,
)
from adapters._store.commit import View

FORMAT, READABLE = 3, (1, 2, 3)
SINCE = {"map": 2, "tokens": 3}  # the fields that earlier formats had not
LARGEST_RECORD = 256 << 20  # bytes; a record of 100,000 tensors takes 30 MB
KEYS = {"format", "name", "method", "sites", "head", "labels", "base", "tensors", "files", "versions", "facts"} | {
    "training",
    "created",
    "map",
    "tokens",
    "digest",
}


def encode(bundle: Bundle, file_keys: Mapping[str, str], config: bytes | None, weights: bytes) -> bytes:
    """The text of `adapter.json`. `file_keys` maps our tensor names to those in the safetensors file."""
    files = {WEIGHTS: weights, **({CONFIG: config} if config is not None else {})}
    tensors = {
        key: {
            "file_key": file_keys[key],
            "dtype": _name(tensor),
            "shape": list(tensor.shape),
            "sha256": _sha(_raw(tensor)),
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
        "files": {name: {"bytes": len(content), "sha256": _sha(content)} for name, content in files.items()},
        "versions": dict(bundle.versions),
        "facts": dict(bundle.facts),
        "training": dict(bundle.training),
        "created": bundle.created,
        "map": bundle.map,
        "tokens": tokens_record(bundle.tokens),
        "digest": "",
    }
    return _text({**record, "digest": _sha(_text(record))})


def decode(view: View) -> Bundle:
    """The adapter that a folder with an `adapter.json` holds, every digest, shape and value checked.

    Raises:
        DamagedAdapter: anything differs from what was written; the sentence names the file.
    """
    record = _record(view)
    held = _files(view, record["files"])
    found = _tensors(held[WEIGHTS], record["tensors"])
    require_finite(found, WEIGHTS)
    return Bundle(
        name=_typed(record, "name", str),
        method=method_of(record["method"]),
        sites=tuple(site_of(site) for site in _typed(record, "sites", list)),
        tensors=found,
        head=tuple(str(path) for path in _typed(record, "head", list)),
        base=_typed(record, "base", dict),
        facts=_typed(record, "facts", dict),
        training=_typed(record, "training", dict),
        labels=record["labels"],
        versions=_typed(record, "versions", dict),
        created=_typed(record, "created", str),
        map=record.get("map"),
        tokens=tokens_of(record.get("tokens")),
    )


def _record(view: View) -> dict[str, Any]:
    if view.size(RECORD) > LARGEST_RECORD:
        raise DamagedAdapter(f"{RECORD} has {view.size(RECORD):,} bytes, more than any adapter's record needs.")
    raw = view[RECORD]
    try:
        record = json.loads(raw.decode("ascii"), object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedAdapter(f"{RECORD} is not the JSON that was written: it is truncated or damaged.") from error
    if not isinstance(record, dict) or record.get("format") not in READABLE:
        have = record.get("format") if isinstance(record, dict) else None
        raise DamagedAdapter(f"{RECORD} has the format {str(have)[:20]!r}; this version reads formats up to {FORMAT}.")
    later = {key for key, since in SINCE.items() if since > record["format"]}
    if set(record) != KEYS - later or not _canonical(record, raw):
        raise DamagedAdapter(f"{RECORD} was altered after it was written: its text is not the canonical one.")
    if _sha(_text({**record, "digest": ""})) != record["digest"]:
        raise DamagedAdapter(f"{RECORD} was altered after it was written: its digest does not match.")
    return record


def _canonical(record: Mapping[str, Any], raw: bytes) -> bool:
    try:
        return _text(record) == raw
    except ValueError:  # a number too large for a float was read as infinity
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _files(view: View, expected: Any) -> dict[str, bytes]:
    if not isinstance(expected, dict) or WEIGHTS not in expected or not set(expected) <= {WEIGHTS, CONFIG}:
        raise DamagedAdapter(f"{RECORD} names other files than an adapter has.")
    if CONFIG in view and CONFIG not in expected:
        raise DamagedAdapter(f"{CONFIG} does not belong to this adapter: {RECORD} does not know it.")
    held = {}
    for name, entry in expected.items():
        if name not in view:
            raise DamagedAdapter(f"{name} is missing.")
        if view.size(name) != entry["bytes"]:
            raise DamagedAdapter(f"{name} has {view.size(name):,} bytes instead of {entry['bytes']:,}.")
        held[name] = view[name]
        if _sha(held[name]) != entry["sha256"]:
            raise DamagedAdapter(f"{name} was altered after it was written: its digest does not match.")
    return held


def _tensors(weights: bytes, expected: Any) -> dict[str, Tensor]:
    """The tensors by our names: exactly those recorded, in their types, seen in their shapes (PEFT's may be others)."""
    stored = parse(weights)
    by_file_key = {entry["file_key"]: key for key, entry in expected.items()}
    for file_key in sorted(set(by_file_key) ^ set(stored)):
        what = "holds the unknown tensor" if file_key in stored else "lacks the tensor"
        raise DamagedAdapter(f"{WEIGHTS} {what} {file_key}.")
    found = {}
    for file_key, key in by_file_key.items():
        tensor, entry = stored[file_key], expected[key]
        if tensor.numel() != prod(entry["shape"]) or _name(tensor) != entry["dtype"]:
            raise DamagedAdapter(f"{WEIGHTS}: {file_key} has another shape or type than {RECORD} says.")
        found[key] = tensor.view(entry["shape"])
    return found


def parse(weights: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file by the names in it.

    Raises:
        DamagedAdapter: it is truncated or not a safetensors file.
    """
    try:
        return safetensors.torch.load(weights)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DamagedAdapter(f"{WEIGHTS} is truncated or damaged: {error}.") from error


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


def _text(record: Mapping[str, Any]) -> bytes:
    """One line a field: json's fast encoder knows no indentation, and the slow one takes half of a load's time."""
    lines = [f"{json.dumps(key)}: {json.dumps(record[key], sort_keys=True, allow_nan=False)}" for key in sorted(record)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def _sha(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
