"""Saves and loads compositions and fusions, each with the adapters that it is made of, and single adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adapters._attach import activate as make_active
from adapters._attach import adapters_of, compose, detach, state_of, tensors_of, unwrapped
from adapters._contract import FusionMethod
from adapters._errors import AdapterError
from adapters._selection import expanded, from_record, names_in
from adapters._sharded import writes
from adapters._store.bundle import CARD, PARTS, RECORD, Bundle
from adapters._store.card import composition_card, ours
from adapters._store.carried import Bring, carrying
from adapters._store.loading import Force, Source
from adapters._store.loading import load as load_adapter
from adapters._store.parts import drop_parts, part_folder, parts_record, put_part, put_top, record_in
from adapters._store.reading import open_folder, resolve
from adapters._store.reports import LoadReport, SaveReport
from adapters._store.saving import existing_card, prepared
from adapters._store.saving import save as save_adapter


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
        report = save_adapter(model, name, folder, dtype, facts)
        if writes(_tensors(model, name)):
            drop_parts(report.folder, kept=set())
        return report
    tensors = [tensor for part in (*parts, *([name] if own.get(RECORD) else [])) for tensor in _tensors(model, part)]
    write = writes(tensors)
    written = {part: _save_part(model, part, folder, dtype, write) for part in parts}
    files = {**own, PARTS: parts_record(name, selection, written)}
    if write:
        put_top(folder, files, {part["folder"] for part in written.values()})
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
    tokenizer: Any = None,
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
        tokenizer: the base's; tokens that the adapter was trained with are added to it, and their rows to the model, as
            `adapters.add_tokens` does, where they lack. Without it the base must have the rows already.

    Raises:
        WrongBase: the model is not the base that the adapter was trained on.
        DamagedAdapter: a file is missing, truncated or altered, or holds values that are not finite.
        AdapterError: the name is taken, or the folder holds something that this version cannot read.
    """
    record = None if isinstance(source, Bundle) else record_in(resolve(source))
    with carrying(unwrapped(model), tokenizer) as bring:
        if record is None or isinstance(source, Bundle):
            return load_adapter(model, source, name, trainable, activate, force, bring)
        return _load(model, source, name, trainable, activate, force, bring, record)


def _load(
    model: nn.Module,
    source: str | os.PathLike[str],
    name: str | None,
    trainable: bool,
    activate: bool,
    force: Force | None,
    bring: Bring,
    record: Mapping[str, Any],
) -> LoadReport:
    """A composition: its parts, and what puts them together."""
    state, added = state_of(model), list[str]()
    acting = state.active.value if state is not None else None
    try:
        parts = _load_parts(model, resolve(source), record, trainable, force, bring, added)
        chosen, selection = name if name is not None else record["name"], from_record(record["selection"])
        if selection is None:
            top = load_adapter(model, source, chosen, trainable, activate, force, bring)
        else:
            compose(model, chosen, selection)
            base = parts[0].base if parts else "its parts were attached already"
            top = LoadReport(resolve(source), chosen, repr(selection), 0, 0, 0, base)
        added.append(chosen)
        if activate:
            make_active(model, chosen)
    except BaseException:
        for each in reversed(added):
            detach(model, each)
        if adapters_of(model):
            make_active(model, acting)
        raise
    return _summed(top, parts, record["parts"])


def _load_parts(
    model: nn.Module,
    place: str,
    record: Mapping[str, Any],
    trainable: bool,
    force: Force | None,
    bring: Bring,
    added: list[str],
) -> list[LoadReport]:
    """Loads the parts that are not attached yet, inactive; their names go into `added`."""
    reports = []
    bundles = {part: _part(place, part, entry, model) for part, entry in record["parts"].items()}
    notes = bring(bundles.values())  # the base of all of them has these
    for part, bundle in bundles.items():
        if not _attached_alike(model, part, bundle):
            trains = trainable and record["selection"] is not None
            reports.append(load_adapter(model, bundle, part, trains, activate=False, force=force))
            added.append(part)
    if reports:
        reports[0] = replace(reports[0], notes=(*notes, *reports[0].notes))
    return reports


def _summed(top: LoadReport, parts: Sequence[LoadReport], names: Iterable[str]) -> LoadReport:
    """The report of a composition: its own, with what its parts add."""
    count = {
        key: getattr(top, key) + sum(getattr(part, key) for part in parts) for key in ("sites", "tensors", "parameters")
    }
    notes = (f"made of {', '.join(map(repr, names))}", *top.notes, *(note for part in parts for note in part.notes))
    return replace(top, **count, notes=notes)


def _save_part(
    model: nn.Module, name: str, folder: str | os.PathLike[str], dtype: torch.dtype | str | None, write: bool
) -> dict[str, Any]:
    adapter = adapters_of(model)[name]
    return put_part(folder, name, adapter.method, adapter.sites, prepared(model, name, folder, dtype, None)[0], write)


def _part(place: str, name: str, entry: Mapping[str, Any], model: nn.Module) -> Bundle:
    return open_folder(part_folder(place, name, entry), model)


def _attached_alike(model: nn.Module, name: str, bundle: Bundle) -> bool:
    """Whether the part is attached already; an adapter of its name that is another one is refused."""
    adapter = adapters_of(model).get(name)
    if adapter is None:
        return False
    here = tensors_of(model, name)
    for key in here.keys() & bundle.tensors.keys():
        if here[key].dtype != bundle.tensors[key].dtype:
            held, saved = (str(each[key].dtype).removeprefix("torch.") for each in (here, bundle.tensors))
            raise AdapterError(
                f"a part is called {name!r} and was saved in {saved}; the adapter {name!r} that is attached is in "
                f"{held}, and is not what the composition was saved with: detach it first."
            )
    same = adapter.method == bundle.method and here.keys() == bundle.tensors.keys()
    if not same or not all(torch.equal(here[key].cpu(), tensor) for key, tensor in bundle.tensors.items()):
        raise AdapterError(f"a part is called {name!r}, as another adapter that is attached: detach that first.")
    return True


def _tensors(model: nn.Module, name: str) -> list[torch.Tensor]:
    return list(tensors_of(model, name).values())
