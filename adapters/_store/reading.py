"""Reads adapter folders, ours, PEFT's and AdapterHub's, into bundles."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from typing import Any

from torch import Tensor, nn

from adapters._attach import state_of
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.peft_read import parse_config, understand
from adapters._sites import sites
from adapters._store import commit, hub, zipped
from adapters._store.bundle import (
    CONFIG,
    LARGEST_CONFIG,
    OWNED,
    PARTS,
    RECORD,
    WEIGHTS,
    Bundle,
    require_finite,
    versions,
)
from adapters._store.record import decode
from adapters._store.weights import parse

PICKLED = "adapter_model.bin"  # what PEFT wrote before 0.6, and later where it was asked to


def read(folder: str | os.PathLike[str], model: nn.Module | None = None) -> Bundle:
    """An adapter folder (or a Hub repository) kept in memory, every digest, shape and value checked.

    `adapters.load` and `adapters.swap` take what it returns in the place of a folder, as often as wanted, and then only
    check what depends on the model: its base and its sites.

    Args:
        model: what a folder that PEFT or AdapterHub wrote is understood by: neither records sites, as ours does.

    Raises:
        DamagedAdapter: a file is missing, truncated or altered, or holds values that are not finite.
        AdapterError: the folder holds something that this version cannot read, or is not ours and no model is given.
    """
    return open_folder(folder, model)


def open_folder(folder: str | os.PathLike[str], model: nn.Module | None, check: bool = True) -> Bundle:
    """As `read`. `check=False` leaves out digests and the look for values that are not finite."""
    place = resolve(folder)
    try:
        with commit.reading(place) as view:
            bundle = decode(view, check) if RECORD in view else _from_others(model, place, view, check)
    except DamagedAdapter as error:
        if place == os.fspath(folder):
            raise
        raise DamagedAdapter(f"{error} It was fetched from {folder}: remove {place} to fetch it again.") from error
    fetched = _commit_of(place) if place != os.fspath(folder) else ""
    notes = (*bundle.notes, f"fetched from {folder}, commit {fetched}.") if fetched else bundle.notes
    return dataclasses.replace(bundle, folder=place, notes=notes, seen=versions(bundle.tensors) if check else None)


def resolve(folder: str | os.PathLike[str]) -> str:
    """The local folder that a path or a Hub id means; a Hub repository's adapter files are fetched once and cached.

    A Hub id is "org/name" or "hub:org/name", with "@revision" after it: a commit stays what it is, a branch or a tag
    may move.
    """
    place = os.fspath(folder)
    if os.path.isdir(place):
        return place
    named = re.fullmatch(r"(hub:)?([\w][\w.-]*/[\w][\w.-]*)(?:@([\w][\w./-]*))?", place)
    if os.path.exists(place) or named is None:
        raise AdapterError(
            f"{place} is no adapter folder: give a folder, or a Hub id such as 'hub:org/name' or "
            "'hub:org/name@revision'."
        )
    try:
        from huggingface_hub import snapshot_download

        return str(
            snapshot_download(named[2], revision=named[3], allow_patterns=[*OWNED, PICKLED, *hub.NAMES, "part-*/*"])
        )
    except Exception as error:  # the Hub's client has a dozen kinds, from a missing repository to no network
        here = "" if named[1] else f"there is no folder {place} here, and "
        at = f" at {named[3]}" if named[3] else ""
        raise AdapterError(
            f"{here}the Hub gave no {named[2]}{at}: {type(error).__name__}; nothing was loaded."
        ) from error


def _commit_of(place: str) -> str:
    """The commit that a folder in the Hub's cache is of."""
    above, name = os.path.split(os.path.normpath(place))
    return name if os.path.basename(above) == "snapshots" else ""


def _from_others(model: nn.Module | None, place: str, view: commit.View, check: bool) -> Bundle:
    if PARTS in view:
        raise AdapterError(f"{place} holds a composition of adapters: adapters.load brings it with its parts.")
    if CONFIG not in view:
        raise AdapterError(f"{place} holds no adapter: neither {RECORD} nor {CONFIG} is there.")
    writer = "AdapterHub" if hub.wrote(view) else "PEFT"
    if model is None:
        raise AdapterError(
            f"{place} was written by {writer} and records no sites: give read the model, or use adapters.load."
        )
    state = state_of(model)
    known = state.map if state is not None and state.map is not None else sites(model)
    if writer != "PEFT":
        return hub.hub_bundle(model, known, view, check)
    config, tensors = peft_files(view, check)
    found = understand(config, tensors, model, known)
    name = os.path.basename(os.path.abspath(place))
    notes = [f"written by PEFT for {found.base}." if found.base else "written by PEFT.", *found.notes]
    held = weights_file(view)
    notes += [f"{PICKLED} was read as data: nothing of it was unpickled."] if held == PICKLED else []
    digest = hashlib.sha256(view[CONFIG] + view[held]).hexdigest()
    kept: dict[str, Any] = {"map": known, "notes": tuple(notes), "digest": digest}
    return Bundle(name, found.method, found.sites, found.tensors, found.head, tokens=found.tokens, **kept)


def peft_files(view: commit.View, check: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder that PEFT wrote."""
    hub.refuse_as_peft(view)
    held = weights_file(view)
    if view.size(CONFIG) > LARGEST_CONFIG:
        raise DamagedAdapter(f"{CONFIG} has {view.size(CONFIG):,} bytes, more than a configuration needs.")
    content = view[held]
    config = parse_config(view[CONFIG])
    tensors = parse(content) if held == WEIGHTS else zipped.parse(content, held)
    if check:
        require_finite(tensors, held)
    return config, tensors


def weights_file(view: commit.View) -> str:
    """The file with the tensors of a folder that PEFT wrote.

    Raises:
        DamagedAdapter: there is none.
    """
    found = next((name for name in (WEIGHTS, PICKLED) if name in view), None)
    if found is None:
        raise DamagedAdapter(f"{WEIGHTS} is missing, and so is {PICKLED}.")
    return found
