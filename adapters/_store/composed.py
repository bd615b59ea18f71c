"""Compositions in folders: the selection, or the fusion, on top, and each adapter that it is made of below.

    adapter_parts.json                the selection and its parts, with the digest of each part's record
    part-<digest of its tensors>/     an adapter's folder, as `save` writes it

Parts are written first and never overwritten, so that the top, committed in one step, always finds those it names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapters._attach import activate as make_active
from adapters._attach import adapters_of, compose, detach, state_of, tensors_of
from adapters._contract import FusionMethod
from adapters._errors import AdapterError, DamagedAdapter
from adapters._selection import expanded, from_record, names_in, record_of
from adapters._store import commit
from adapters._store.bundle import CARD, OWNED, PARTS, RECORD, WEIGHTS, Bundle, method_record
from adapters._store.card import composition_card, ours
from adapters._store.loading import Force, Source
from adapters._store.loading import load as load_adapter
from adapters._store.reading import open_folder, resolve
from adapters._store.reports import LoadReport, SaveReport
from adapters._store.saving import existing_card, prepared
from adapters._store.saving import save as save_adapter

FORMAT = 1
FOLDER = re.compile(r"part-[0-9a-f]{16}")
LARGEST = 1 << 20  # bytes


def save(
    model: nn.Module,
    name: str,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> SaveReport:
    """Writes the adapter, or the composition, `name` of `model` into `folder`.

    Of an adapter: its tensors, its record, a model card, PEFT's configuration. Only its own files are replaced, as one
    step that a crash cannot divide. Where the model is sharded over processes (FSDP2), all of them must call; the first
    one writes. Of a composition or a fusion: the same for each part, in folders below, and what puts them together.

    Args:
        dtype: what the tensors are stored as ("bfloat16" halves the file and rounds them); None keeps their own.
        facts: what to remember of the training: data, steps, scores; JSON-able.

    Raises:
        AdapterError: no such adapter, a tensor that is not finite, or a folder that cannot be written.
    """
    state = state_of(model)
    named = state.named if state is not None else {}
    adapter = adapters_of(model).get(name)
    if name in named:
        selection = expanded(named[name], named)
        own: dict[str, bytes] = {}
        parts, method = dict.fromkeys(names_in(selection)), repr(selection)
        report = SaveReport(os.fspath(folder), name, {}, 0, 0, "a composition is several adapters")
        if ours(existing_card(folder)):
            own[CARD] = composition_card(name, method)
    elif adapter is not None and isinstance(adapter.method, FusionMethod):
        selection, parts = None, dict.fromkeys(adapter.method.parts)
        own, report = prepared(model, name, folder, dtype, facts)
    else:
        return save_adapter(model, name, folder, dtype, facts)
    written = {part: _save_part(model, part, folder, dtype) for part in parts}
    record = {"format": FORMAT, "name": name, "selection": record_of(selection), "parts": written}
    files = {**own, PARTS: _text({**record, "digest": _sha(_text(record))})}
    commit.write(folder, files, set(OWNED) - (set() if CARD in files else {CARD}))
    _sweep(os.fspath(folder), {part["folder"] for part in written.values()})
    tensors = [tensor for part in (*parts, *([name] if own.get(RECORD) else [])) for tensor in _tensors(model, part)]
    sizes = {key: len(content) for key, content in files.items()}
    sizes |= {part["folder"]: part["bytes"] for part in written.values()}
    count = sum(tensor.numel() for tensor in tensors)
    return SaveReport(report.folder, name, sizes, len(tensors), count, report.peft, report.notes)


def load(
    model: nn.Module,
    source: Source,
    name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
    force: Force | None = None,
) -> LoadReport:
    """Adds a saved adapter, or a composition with all of its parts, to `model`.

    Args:
        source: a folder, a Hub repository, or what `adapters.read` returned.
        name: what to call it here; None takes the recorded name. Parts keep their names; one that is attached already
            with the same tensors is used again.
        trainable: whether it goes on training; otherwise it is frozen. Of a fusion, the fusion alone trains; of any
            other composition, its parts.
        activate: whether it acts at once.
        force: "wrong-base" loads it on another base than it was trained on; nothing else is skipped.

    Raises:
        WrongBase: the model is not the base that the adapter was trained on.
        DamagedAdapter: a file is missing, truncated or altered, or holds values that are not finite.
        AdapterError: the name is taken, or the folder holds something that this version cannot read.
    """
    record = None if isinstance(source, Bundle) else _record(resolve(source))
    if record is None or isinstance(source, Bundle):
        return load_adapter(model, source, name, trainable, activate, force)
    place, added = resolve(source), []
    before = state_of(model)
    acting = before.active.value if before is not None else None
    try:
        reports = []
        for part, entry in record["parts"].items():
            bundle = _part(place, part, entry, model)
            if not _attached_alike(model, part, bundle):
                trains = trainable and record["selection"] is not None
                reports.append(load_adapter(model, bundle, part, trains, activate=False, force=force))
                added.append(part)
        chosen = name if name is not None else record["name"]
        selection = from_record(record["selection"])
        if selection is None:
            top = load_adapter(model, source, chosen, trainable, activate, force)
            added.append(chosen)
        else:
            compose(model, chosen, selection)
            added.append(chosen)
            base = reports[0].base if reports else "its parts were attached already"
            top = LoadReport(place, chosen, repr(selection), 0, 0, 0, base)
            if activate:
                make_active(model, chosen)
    except BaseException:
        for each in reversed(added):
            detach(model, each)
        if adapters_of(model):
            make_active(model, acting)
        raise
    count = [sum(getattr(each, key) for each in reports) for key in ("sites", "tensors", "parameters")]
    kept = tuple(note for each in reports for note in each.notes)
    made_of = f"made of {', '.join(map(repr, record['parts']))}"
    return LoadReport(
        place,
        chosen,
        top.method,
        top.sites + count[0],
        top.tensors + count[1],
        top.parameters + count[2],
        top.base,
        (made_of, *top.notes, *kept),
    )


def _save_part(
    model: nn.Module, name: str, folder: str | os.PathLike[str], dtype: torch.dtype | str | None
) -> dict[str, Any]:
    """Where a part is, written unless it is there already."""
    adapter = adapters_of(model)[name]
    files, _ = prepared(model, name, folder, dtype, None)
    content = _text([name, method_record(adapter.method), [site.path for site in adapter.sites]]) + files[WEIGHTS]
    where = f"part-{_sha(content)[:16]}"
    place = os.path.join(os.fspath(folder), where)
    with contextlib.suppress(AdapterError):
        open_folder(place, None)
        with commit.reading(place) as view:
            return {"folder": where, "record": _sha(view[RECORD]), "bytes": sum(map(view.size, view))}
    commit.write(place, files, set(OWNED))
    return {"folder": where, "record": _sha(files[RECORD]), "bytes": sum(map(len, files.values()))}


def _part(place: str, name: str, entry: Mapping[str, Any], model: nn.Module) -> Bundle:
    where = os.path.join(place, str(entry["folder"]))
    with commit.reading(where) as view:
        if RECORD not in view or _sha(view[RECORD]) != entry["record"]:
            raise DamagedAdapter(f"{entry['folder']}, the part {name!r}, is not the adapter that was saved there.")
    return open_folder(where, model)


def _attached_alike(model: nn.Module, name: str, bundle: Bundle) -> bool:
    """Whether the part is attached already; an adapter of its name that is another one is refused."""
    adapter = adapters_of(model).get(name)
    if adapter is None:
        return False
    here = tensors_of(model, name)
    same = adapter.method == bundle.method and here.keys() == bundle.tensors.keys()
    if not same or not all(torch.equal(here[key].cpu(), tensor) for key, tensor in bundle.tensors.items()):
        raise AdapterError(f"a part is called {name!r}, as another adapter that is attached: detach that first.")
    return True


def _record(place: str) -> dict[str, Any] | None:
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
        intact = known and _text({**record, "digest": digest}) == raw and _sha(_text(record)) == digest
    except (ValueError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DamagedAdapter(f"{PARTS} was altered after it was written: its digest does not match.")
    if record["format"] != FORMAT:
        raise DamagedAdapter(f"{PARTS} has the format {record['format']!r}; this version reads {FORMAT}.")
    if not all(FOLDER.fullmatch(str(entry.get("folder"))) for entry in record["parts"].values()):
        raise DamagedAdapter(f"{PARTS} names folders that are none of a composition's.")
    return record  # type: ignore[no-any-return]


def _sweep(folder: str, kept: set[str]) -> None:
    """Removes parts of an earlier composition, if they hold nothing but an adapter's files."""
    for where in os.listdir(folder):
        place = os.path.join(folder, where)
        if where in kept or not FOLDER.fullmatch(where) or os.path.islink(place) or not os.path.isdir(place):
            continue
        if set(os.listdir(place)) <= set(OWNED):
            for file in os.listdir(place):
                os.unlink(os.path.join(place, file))
            os.rmdir(place)


def _tensors(model: nn.Module, name: str) -> list[torch.Tensor]:
    return list(tensors_of(model, name).values())


def _text(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode("ascii")


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
