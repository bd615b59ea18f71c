"""The files of a composition: its record, and the folders of its parts.

    adapter_parts.json                the selection and its parts, with the digest of each part's record
    part-<digest of its tensors>/     an adapter's folder, as `save` writes it

Parts are written first and never overwritten, so that the top, committed in one step, always finds those it names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from adapters._contract import Method, Site
from adapters._errors import AdapterError, DamagedAdapter
from adapters._selection import Part, record_of
from adapters._store import commit
from adapters._store.bundle import CARD, OWNED, PARTS, RECORD, WEIGHTS, method_record
from adapters._store.reading import open_folder
from adapters._store.record import sha

FORMAT = 1
FOLDER = re.compile(r"part-[0-9a-f]{16}")
LARGEST = 1 << 20  # bytes


def parts_record(name: str, selection: Part, parts: Mapping[str, Any]) -> bytes:
    """The text of `adapter_parts.json`; `selection` is None for a fusion, whose own tensors lie beside it."""
    record = {"format": FORMAT, "name": name, "selection": record_of(selection), "parts": dict(parts)}
    return _text({**record, "digest": sha(_text(record))})


def put_part(
    folder: str | os.PathLike[str],
    name: str,
    method: Method,
    sites: Iterable[Site],
    files: Mapping[str, bytes],
    write: bool = True,
) -> dict[str, Any]:
    """Where a part is, written unless it is there already; `write` is False on processes that leave it to another."""
    content = _text([name, method_record(method), [site.path for site in sites]]) + files[WEIGHTS]
    where = f"part-{sha(content)[:16]}"
    place = os.path.join(os.fspath(folder), where)
    with contextlib.suppress(AdapterError):
        open_folder(place, None)
        with commit.reading(place) as view:
            return {"folder": where, "record": sha(view[RECORD]), "bytes": sum(map(view.size, view))}
    if write:
        commit.write(place, files, set(OWNED))
    return {"folder": where, "record": sha(files[RECORD]), "bytes": sum(map(len, files.values()))}


def part_folder(place: str, name: str, entry: Mapping[str, Any]) -> str:
    """Where a part is, which is the one that was saved there.

    Raises:
        DamagedAdapter: it is another one.
    """
    where = os.path.join(place, str(entry["folder"]))
    with commit.reading(where) as view:
        if RECORD not in view or sha(view[RECORD]) != entry["record"]:
            raise DamagedAdapter(f"{entry['folder']}, the part {name!r}, is not the adapter that was saved there.")
    return where


def put_top(folder: str | os.PathLike[str], files: Mapping[str, bytes], kept: set[str]) -> None:
    """Commits a composition whose parts are in the folders `kept`, and removes those of an earlier one."""
    commit.write(folder, files, set(OWNED) - (set() if CARD in files else {CARD}))
    drop_parts(os.fspath(folder), kept)


def drop_parts(root: str, kept: set[str]) -> None:
    """Removes the parts of an earlier composition, if they hold nothing but an adapter's files."""
    for where in os.listdir(root):
        place = os.path.join(root, where)
        if where in kept or not FOLDER.fullmatch(where) or os.path.islink(place) or not os.path.isdir(place):
            continue
        if set(os.listdir(place)) <= set(OWNED):
            for file in os.listdir(place):
                os.unlink(os.path.join(place, file))
            os.rmdir(place)


def record_in(place: str) -> dict[str, Any] | None:
    """What a folder's composition is made of, checked; None where it holds a single adapter."""
    with commit.reading(place) as view:
        if PARTS not in view:
            return None
        if view.size(PARTS) > LARGEST:
            raise DamagedAdapter(f"{PARTS} has {view.size(PARTS):,} bytes, more than any composition needs.")
        raw = view[PARTS]
    try:
        record = json.loads(raw.decode("ascii"))
        known = set(record) == {"format", "name", "selection", "parts", "digest"}
        digest = record.pop("digest") if known else ""
        intact = known and _text({**record, "digest": digest}) == raw and sha(_text(record)) == digest
    except (ValueError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedAdapter(f"{PARTS} was altered after it was written: its digest does not match.")
    if record["format"] != FORMAT:
        raise DamagedAdapter(f"{PARTS} has the format {record['format']!r}; this version reads {FORMAT}.")
    parts = record["parts"]
    known = isinstance(parts, dict) and all(isinstance(entry, dict) for entry in parts.values())
    if not known or not all(FOLDER.fullmatch(str(e.get("folder"))) and "record" in e for e in parts.values()):
        raise DamagedAdapter(f"{PARTS} does not say which parts a composition has, and in which folders.")
    return record  # type: ignore[no-any-return]


def _text(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode("ascii")
