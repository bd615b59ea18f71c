"""Tensors from a file that torch.save wrote, read as data: nothing in it is executed, imported or unpickled.

Such a file is a zip of uncompressed members: `data.pkl`, which describes the tensors, and their storages beside it,
`data/0`, `data/1`, ... (torch/serialization.py, caffe2/serialize/inline_container.cc).
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from adapters._errors import DamagedAdapter
from adapters._store.program import Machine, Storage, View

LARGEST_PROGRAM = 4 << 20  # bytes; a tensor takes about 200
SHARED = 8  # how many times its own size a file's tensors may have together: tied weights are one storage
UNREADABLE = (
    zipfile.BadZipFile, struct.error, EOFError, KeyError, IndexError, NotImplementedError, OSError, OverflowError,
    RuntimeError, ValueError,
)  # fmt: skip  # what zipfile is known to raise at files that are none


def parse(content: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote from a flat dictionary, by the names in it.

    Args:
        where: the file's name, which begins each sentence.

    Raises:
        DamagedAdapter: it is not such a file, or holds anything else; nothing of it was executed.
    """
    try:
        members = _members(content, where)
        views = Machine(where).run(members.pop("data.pkl"))
        return _tensors(views, members, where, len(content))
    except RecursionError as error:
        raise DamagedAdapter(f"{where} is nested too deeply.") from error


def _members(content: bytes, where: str) -> dict[str, bytes]:
    """`data.pkl` and the storages, `data/<key>`, of the zip."""
    if content[:1] == b"\x80":
        raise DamagedAdapter(f"{where} is a pickle outside a zip, torch's format before 1.6, which is never read.")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = archive.infolist()
            _require_plain(found, where)
            top = [info.filename for info in found if info.filename.split("/")[1:] == ["data.pkl"]]
            if len(top) != 1:
                raise DamagedAdapter(f"{where} is a zip, but not one that torch.save wrote: it has no data.pkl.")
            root = top[0].removesuffix("data.pkl")
            named = {info.filename.removeprefix(root): info for info in found if info.filename.startswith(root)}
            if "byteorder" in named and archive.read(named["byteorder"]) != b"little":
                raise DamagedAdapter(f"{where} was written on a machine with another byte order.")
            if named["data.pkl"].file_size > LARGEST_PROGRAM:
                raise DamagedAdapter(f"{where}: data.pkl has more bytes than a dictionary of tensors needs.")
            wanted = [name for name in named if name == "data.pkl" or name.startswith("data/")]
            return {name: archive.read(named[name]) for name in wanted}
    except UNREADABLE as error:
        if isinstance(error, DamagedAdapter):
            raise
        raise DamagedAdapter(f"{where} is truncated or damaged: it is no zip that can be read whole.") from error


def _require_plain(found: list[zipfile.ZipInfo], where: str) -> None:
    """Members uncompressed, unencrypted, once each, and none over another: reading them takes the file's own size."""
    names: set[str] = set()
    end = 0
    for info in sorted(found, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise DamagedAdapter(f"{where}: the member {info.filename[:80]!r} is compressed, which torch never does.")
        if info.flag_bits & 1:
            raise DamagedAdapter(f"{where}: the member {info.filename[:80]!r} is encrypted.")
        if info.filename in names:
            raise DamagedAdapter(f"{where} holds the member {info.filename[:80]!r} twice.")
        if info.header_offset < end:
            raise DamagedAdapter(f"{where}: the member {info.filename[:80]!r} lies over another.")
        names.add(info.filename)
        end = info.header_offset + info.compress_size


def _tensors(views: Mapping[str, View], members: Mapping[str, bytes], where: str, size: int) -> dict[str, Tensor]:
    held: dict[str, tuple[Storage, Tensor]] = {}
    total = 0
    for name, view in views.items():
        if view.storage.key not in held:
            held[view.storage.key] = (view.storage, _stored(view.storage, members, where))
        known, stored = held[view.storage.key]
        if known != view.storage:
            raise DamagedAdapter(f"{where}: the storage {known.key} is described in two ways.")
        _require_inside(view, name, where)
        total += prod(view.shape) * stored.element_size()
        if total > SHARED * size:
            raise DamagedAdapter(f"{where}: its tensors share storages so often that they are larger than the file.")
    return {
        name: held[view.storage.key][1].as_strided(view.shape, view.strides, view.offset).contiguous()
        for name, view in views.items()
    }


def _stored(storage: Storage, members: Mapping[str, bytes], where: str) -> Tensor:
    content = members.get(f"data/{storage.key}")
    if content is None:
        raise DamagedAdapter(f"{where} lacks the storage {storage.key}.")
    if len(content) != storage.size * storage.dtype.itemsize:
        raise DamagedAdapter(f"{where}: the storage {storage.key} has another size than data.pkl says.")
    if not content:
        raise DamagedAdapter(f"{where}: the storage {storage.key} is empty, which none of an adapter is.")
    return torch.frombuffer(bytearray(content), dtype=storage.dtype)


def _require_inside(view: View, name: str, where: str) -> None:
    """Every element inside the storage, and no two the same one: a view cannot be larger than what it is of."""
    if not prod(view.shape):
        raise DamagedAdapter(f"{where}: {name[:80]!r} is empty, which no tensor of an adapter is.")
    extent = 1
    for size, stride in sorted(zip(view.shape, view.strides, strict=True), key=lambda axis: axis[1]):
        if size > view.storage.size or (size > 1 and stride < extent):
            raise DamagedAdapter(f"{where}: the elements of {name[:80]!r} lie over each other.")
        extent += (size - 1) * stride if size > 1 else 0
    if view.offset + extent > view.storage.size:
        raise DamagedAdapter(f"{where}: {name[:80]!r} reaches beyond its storage.")
