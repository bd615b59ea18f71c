"""Puts saved adapters together into a composition, folder to folder, without a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from adapters._errors import AdapterError
from adapters._selection import Average, Split, Stack
from adapters._store import commit
from adapters._store.bundle import CARD, OWNED, PARTS
from adapters._store.card import composition_card, ours
from adapters._store.parts import parts_record, put_part, put_top
from adapters._store.reading import open_folder, resolve
from adapters._store.reports import SaveReport
from adapters._store.saving import existing_card


def compose_folders(
    output: str | os.PathLike[str],
    folders: Sequence[str | os.PathLike[str]],
    name: str,
    weights: Sequence[float] | None = None,
    at: Sequence[int] | None = None,
) -> SaveReport:
    """Writes a Stack of saved adapters, an Average where `weights` are given, a Split where `at` is.

    Raises:
        AdapterError: two have one name, or a folder holds no adapter of ours; nothing was written.
    """
    found = {}
    for folder in folders:
        place = resolve(folder)
        with commit.reading(place) as view:
            if PARTS in view:
                raise AdapterError(f"{place} is a composition itself: give the adapters that it is made of.")
            files = {file: view[file] for file in OWNED if file in view}
        bundle = open_folder(place, None)
        if bundle.name in found:
            raise AdapterError(f"two adapters are called {bundle.name!r}: load one and save it under another name.")
        found[bundle.name] = (bundle, files)
    selection: Stack | Average | Split = Stack(*found)
    if weights is not None:
        selection = Average(*found, weights=tuple(weights))
    if at is not None:
        selection = Split(*found, at=tuple(at))
    written = {
        part: put_part(output, part, bundle.method, bundle.sites, files) for part, (bundle, files) in found.items()
    }
    top = {PARTS: parts_record(name, selection, written)}
    if ours(existing_card(output)):
        top[CARD] = composition_card(name, repr(selection))
    put_top(output, top, {part["folder"] for part in written.values()})
    tensors = [tensor for bundle, _ in found.values() for tensor in bundle.tensors.values()]
    sizes = {key: len(content) for key, content in top.items()}
    sizes |= {part["folder"]: part["bytes"] for part in written.values()}
    count = sum(tensor.numel() for tensor in tensors)
    return SaveReport(
        os.fspath(output), name, sizes, len(tensors), count, "a composition is several adapters", (repr(selection),)
    )
