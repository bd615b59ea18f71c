"""Puts saved tensors back into an attached adapter, in place, as resuming a run needs it."""

from __future__ import annotations

import os

import torch
from torch import nn

from adapters._attach import Adapter, adapters_of, tensors_of
from adapters._errors import AdapterError, nearest
from adapters._sharded import put
from adapters._store import commit
from adapters._store.basecheck import check_base
from adapters._store.bundle import RECORD, Bundle
from adapters._store.loading import Force, Source, notes_on, opened, report
from adapters._store.record import decode
from adapters._store.reports import LoadReport


def restore(model: nn.Module, name: str, source: Source, force: Force | None = None) -> LoadReport:
    """Copies the tensors of a saved adapter into those of the attached adapter `name`: the parameters stay the same.

    What resuming needs, where an optimizer already holds the parameters; `swap` makes new ones.

    Raises:
        WrongBase, DamagedAdapter: as `load`.
        AdapterError: the folder holds another method, or other sites, than is attached; nothing was copied.
    """
    attached = adapters_of(model)
    if name not in attached:
        raise AdapterError(f"no adapter {name!r} on this model{nearest(name, attached)} Use adapters.load to add one.")
    bundle = opened(source, model)
    base = check_base(model, bundle, force)
    here, adapter = tensors_of(model, name), attached[name]
    differ = _tokens_apart(bundle, adapter) or sorted(here.keys() ^ bundle.tensors.keys())
    differ = differ or [key for key, tensor in here.items() if tensor.shape != bundle.tensors[key].shape]
    if bundle.method != adapter.method or differ:
        where = f", {differ[0]} among others" if differ else ""
        raise AdapterError(
            f"{bundle.folder} holds {bundle.method!r}{where}, and {name!r} is {adapter.method!r}: nothing was "
            "restored; attach what was saved, or load the folder under a name of its own."
        )
    with torch.no_grad():
        for key, parameter in here.items():
            put(parameter, bundle.tensors[key])
    return report(bundle, name, base, notes_on(model, bundle))


def _tokens_apart(bundle: Bundle, adapter: Adapter) -> list[str]:
    """Whether other tokens were saved than are attached: their rows could have the same shape."""
    saved, here = (set(tokens.ids) if tokens is not None else set() for tokens in (bundle.tokens, adapter.tokens))
    return [f"the rows of the tokens {sorted(saved)} instead of {sorted(here)}"] if saved != here else []


def restore_attached(model: nn.Module, folder: str) -> None:
    """Restores every attached adapter from where `save_attached` put it, by the names in the records.

    Raises:
        AdapterError: the adapters saved are not those attached; nothing was restored.
    """
    root = _adapters_in(folder)
    inside = sorted(entry.path for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
    saved = {_recorded_name(place): place for place in (root, *inside) if os.path.isfile(os.path.join(place, RECORD))}
    attached = adapters_of(model)
    if saved.keys() != attached.keys():
        have, want = (", ".join(map(repr, sorted(names))) or "none" for names in (saved, attached))
        raise AdapterError(
            f"{folder} holds the adapters {have}, and attached are {want}: attach what was trained there."
        )
    for name in attached:
        restore(model, name, saved[name])


def _recorded_name(place: str) -> str:
    with commit.reading(place) as view:
        return decode(view).name


def _adapters_in(folder: str) -> str:
    """The folder itself, or the one in it where a model that holds the attached one has saved that."""
    if os.path.isfile(os.path.join(folder, RECORD)) or not os.path.isdir(folder):
        return folder
    inside = [entry.path for entry in os.scandir(folder) if os.path.isfile(os.path.join(entry.path, RECORD))]
    return inside[0] if len(inside) == 1 else folder
