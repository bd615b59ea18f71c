"""The tensors of a safetensors file as views of the memory that it was read into.

The first file of a kind is read by safetensors' own reader, which validates the header; files that begin with the same
header, byte for byte, have the same layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adapters._errors import DamagedAdapter
from adapters._finite import finite
from adapters._store import lines
from adapters._store.bundle import RECORD, WEIGHTS
from adapters._store.commit import View
from adapters._store.frozen import known

# what safetensors calls them; a file with others is read by its own reader
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Run:
    """Neighbours of one dtype, from byte `start` to `stop` of the data: of each its shape, its strides, and the element
    of the data at which it begins."""

    dtype: torch.dtype
    start: int
    stop: int
    views: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Layout:
    """Where the tensors are: in the order in which they lie in the file."""

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    size: int  # bytes of the data


@dataclass(frozen=True)
class Stored:
    """The tensors of a file, in its order, and the stretches of one dtype that they are views of."""

    header: bytes
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    runs: tuple[Tensor, ...]

    def require_finite(self) -> None:
        """Refuses NaN and infinity, looking through each stretch once.

        Raises:
            DamagedAdapter: with the tensor's name.
        """
        if all(finite(run) for run in self.runs if run.is_floating_point()):
            return
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if tensor.is_floating_point() and not finite(tensor):
                raise DamagedAdapter(f"{WEIGHTS}: the tensor {name} holds values that are not finite.")


@dataclass(frozen=True)
class File:
    """A safetensors file: its first bytes, up to where the data begin, and the data, (bytes,) uint8."""

    header: bytes
    data: Tensor

    def digest(self) -> str:
        """The SHA-256 of the file."""
        found = hashlib.sha256(self.header)
        found.update(self.data.numpy().data)
        return found.hexdigest()

    def parse(self) -> dict[str, Tensor]:
        """What safetensors' own reader makes of it, in memory of its own.

        Raises:
            DamagedAdapter: it refuses the file.
        """
        try:
            return safetensors.torch.load(self.header + self.data.numpy().tobytes())
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise DamagedAdapter(f"{WEIGHTS} is truncated or damaged: {error}.") from error


def read(view: View) -> File:
    """The folder's safetensors file, read once; the data have memory of their own, which holds nothing else.

    Raises:
        DamagedAdapter: it became shorter meanwhile.
    """
    size = view.size(WEIGHTS)
    first = bytearray(min(8, size))
    view.into(WEIGHTS, memoryview(first))
    header = bytearray(_header_size(first, size))
    data = torch.empty(size - len(header), dtype=torch.uint8, device="cpu")
    if view.into(WEIGHTS, memoryview(header), data.numpy().data) != size:
        raise DamagedAdapter(f"{WEIGHTS} became shorter while it was read.")
    return File(bytes(header), data)


def _header_size(first: bytes | bytearray, size: int) -> int:
    return min(8 + int.from_bytes(first[:8], "little"), size)


def unpack(file: File) -> Stored:
    """The tensors of a safetensors file, as views of its data.

    Raises:
        DamagedAdapter: it is truncated or not a safetensors file.
    """
    layout = known.get("header", file.header, lambda _: _layout(file))
    if layout is None:
        found = dict(sorted(file.parse().items()))
        return Stored(file.header, tuple(found), tuple(found.values()), tuple(found.values()))
    if file.data.numel() != layout.size:
        raise DamagedAdapter(f"{WEIGHTS} is truncated or damaged: it has {file.data.numel():,} bytes of tensors.")
    runs = tuple(file.data[run.start : run.stop].view(run.dtype) for run in layout.runs)
    # half the time of splitting, and viewing each part in its shape
    views = [run.as_strided(*view) for run, here in zip(runs, layout.runs, strict=True) for view in here.views]
    return Stored(file.header, layout.names, tuple(views), runs)


def parse(weights: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file by the names in it.

    Raises:
        DamagedAdapter: it is truncated or not a safetensors file.
    """
    start = _header_size(weights, len(weights))
    rest = bytearray(weights[start:])
    data = torch.frombuffer(rest, dtype=torch.uint8) if rest else torch.empty(0, dtype=torch.uint8)
    stored = unpack(File(weights[:start], data))
    return dict(zip(stored.names, stored.tensors, strict=True))


def matched(stored: Stored, template: bytes) -> dict[str, Tensor]:
    """The tensors by our names: exactly those recorded, in their types, seen in their shapes (PEFT's may be others).

    Args:
        template: the record's JSON of them, without what differs between siblings.

    Raises:
        DamagedAdapter: others are stored than recorded.
    """
    found = known.get("tensors", stored.header + template, lambda _: _matches(stored, lines.value_of(template)))
    return {key: stored.tensors[i] if shape is None else stored.tensors[i].view(shape) for key, i, shape in found}


def _matches(stored: Stored, expected: Any) -> list[tuple[str, int, tuple[int, ...] | None]]:
    """Of each tensor our name, its number in the file, and the shape in which it is seen if that is another one."""
    if not isinstance(expected, dict) or not all(map(_describes, expected.values())):
        raise DamagedAdapter(f"{RECORD}: tensors are not described as this version does it.")
    by_file_key = {entry["file_key"]: key for key, entry in expected.items()}
    if len(by_file_key) != len(expected):
        raise DamagedAdapter(f"{RECORD}: two tensors are said to be the same one of {WEIGHTS}.")
    for name in sorted(set(by_file_key) ^ set(stored.names)):
        what = "holds the unknown tensor" if name in stored.names else "lacks the tensor"
        raise DamagedAdapter(f"{WEIGHTS} {what} {name}.")
    index = {name: i for i, name in enumerate(stored.names)}
    matches = []
    for name, key in by_file_key.items():
        tensor, entry = stored.tensors[index[name]], expected[key]
        if tensor.numel() != prod(entry["shape"]) or name_of(tensor.dtype) != entry["dtype"]:
            raise DamagedAdapter(f"{WEIGHTS}: {name} has another shape or type than {RECORD} says.")
        shape = tuple(entry["shape"])
        matches.append((key, index[name], None if shape == tensor.shape else shape))
    return matches


def _describes(entry: Any) -> bool:
    known = isinstance(entry, Mapping) and set(entry) == {"file_key", "dtype", "shape", "sha256"}
    return known and isinstance(entry["file_key"], str) and _is_shape(entry["shape"])


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, Sequence) and all(type(n) is int and n >= 0 for n in shape)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(file: File) -> Layout | None:
    """The layout that a header describes, or None where views of the data cannot serve it.

    Raises:
        DamagedAdapter: safetensors refuses the file.
    """
    held = file.parse()
    entries = json.loads(file.header[8:])
    entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda entry: tuple(entry[1]["data_offsets"]))
    names = tuple(name for name, _ in ordered)
    shapes = tuple(tuple(entry["shape"]) for _, entry in ordered)
    dtypes = tuple(held[name].dtype for name in names)
    if any(DTYPES.get(entry["dtype"]) is not dtype for (_, entry), dtype in zip(ordered, dtypes, strict=True)):
        return None
    if set(names) != set(held) or shapes != tuple(tuple(held[name].shape) for name in names):
        return None
    runs = _runs(dtypes, shapes, [tuple(entry["data_offsets"]) for _, entry in ordered])
    aligned = runs is not None and all(run.start % run.dtype.itemsize == 0 for run in runs)
    size = file.data.numel()
    if runs is None or not aligned or (runs[-1].stop if runs else 0) != size:
        return None
    return Layout(names, runs, size)


def _runs(
    dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]], offsets: Sequence[tuple[int, ...]]
) -> tuple[Run, ...] | None:
    """Neighbours of one dtype put together; None unless the tensors follow each other without a gap."""
    end, placed = 0, []
    for dtype, shape, (start, stop) in zip(dtypes, shapes, offsets, strict=True):
        if start != end or stop - start != prod(shape) * dtype.itemsize:
            return None
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        placed.append((dtype, start, stop, (shape, strides, start // dtype.itemsize)))
        end = stop
    groups = [list(group) for _, group in groupby(placed, key=itemgetter(0))]
    return tuple(Run(group[0][0], group[0][1], group[-1][2], tuple(view for *_, view in group)) for group in groups)
