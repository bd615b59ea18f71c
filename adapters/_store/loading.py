"""Puts saved adapters into models: everything is checked before the model changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from adapters._attach import Given, adapters_of, install, labels_of, replace, state_of
from adapters._errors import AdapterError, nearest
from adapters._sites import SiteMap
from adapters._store.basecheck import check_base
from adapters._store.bundle import Bundle, require_finite, versions
from adapters._store.carried import Bring
from adapters._store.reading import open_folder
from adapters._store.reports import LoadReport

Force = Literal["wrong-base"]
Source: TypeAlias = str | os.PathLike[str] | Bundle


def load(
    model: nn.Module,
    source: Source,
    name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
    force: Force | None = None,
    bring: Bring = lambda bundles: (),
) -> LoadReport:
    """`adapters.load` for what is no composition.

    Args:
        bring: gives the model the rows of new tokens, and returns what to say of that.
    """
    bundle = opened(source, model)
    brought = bring([bundle])
    base = check_base(model, bundle, force)
    chosen = name if name is not None else bundle.name
    notes = (*brought, *notes_on(model, bundle))
    tensors = _given(bundle, source, trainable)
    kept = {**_kept(bundle), "map": _map(model, bundle) if force is None else None}  # another base has other sites
    install(
        model, chosen, bundle.method, bundle.sites, tensors, trainable=trainable, activate=activate, banked=True, **kept
    )
    return report(bundle, chosen, base, notes)


def swap(
    model: nn.Module,
    name: str,
    source: Source,
    force: Force | None = None,
    check: bool = True,
) -> LoadReport:
    """Replaces the adapter `name` of `model` by a saved one, in place and all or nothing.

    Args:
        source: a folder, a Hub repository, or what `adapters.read` returned.
        force: "wrong-base" puts it on another base than it was trained on.
        check: False skips the digests, the look for values that are not finite and the comparison of the base, and the
            report says so; shapes, sites and the method are checked all the same.

    Raises:
        WrongBase, DamagedAdapter, AdapterError: as `load`; the old adapter then stays.
    """
    attached = adapters_of(model)
    if name not in attached:
        raise AdapterError(f"no adapter {name!r} on this model{nearest(name, attached)} Use adapters.load to add one.")
    bundle = opened(source, model, check)
    base = check_base(model, bundle, force, check)
    notes = notes_on(model, bundle)
    tensors = _given(bundle, source, attached[name].trainable)
    replace(model, name, bundle.method, bundle.sites, tensors, banked=True, **_kept(bundle))
    state = state_of(model)
    if state is not None and state.pool is not None:
        unchanged = bundle.seen is None or bundle.seen == versions(bundle.tensors)
        state.pool.came_from(name, bundle.folder if unchanged else "", bundle.digest)
    return report(bundle, name, base, notes)


def opened(source: Source, model: nn.Module, check: bool = True) -> Bundle:
    """The bundle itself, or the folder's; one whose tensors were changed since they were looked at is looked through.

    Raises:
        DamagedAdapter: a value is not finite, or as `adapters.read`.
    """
    if not isinstance(source, Bundle):
        return open_folder(source, model, check)
    if check and (source.seen is None or source.seen != versions(source.tensors)):
        require_finite(source.tensors, f"the adapter {source.name!r} in memory")
    return source


def _given(bundle: Bundle, source: Source, trainable: bool) -> Mapping[str, Tensor]:
    """The tensors for the model, as copies where what it makes of them would share memory with something else.

    What is frozen and has neither head nor tokens is copied into a row of memory, and everything else kept as it is.
    """
    shared = bundle is source and (bundle.head or bundle.tokens is not None)
    if trainable or shared:
        return {key: tensor.clone() for key, tensor in bundle.tensors.items()}
    return bundle.tensors if bundle is source else Given(bundle.tensors)


def _kept(bundle: Bundle) -> dict[str, Any]:
    return {"head": bundle.head, "facts": bundle.facts, "labels": bundle.labels, "tokens": bundle.tokens}


def _map(model: nn.Module, bundle: Bundle) -> SiteMap | None:
    """The map of the base's sites that the adapter brought along, where none is known yet."""
    state = state_of(model)
    return bundle.map if state is None or state.map is None else None


def notes_on(model: nn.Module, bundle: Bundle) -> tuple[str, ...]:
    """What must be said of an adapter that is put on this model."""
    notes = list(bundle.notes)
    if bundle.labels is not None and labels_of(model) != bundle.labels:
        labels = ", ".join(bundle.labels.values())
        notes.append(f"while it is the active one, the model's labels are the adapter's: {labels}.")
    if bundle.tokens is not None:
        notes.append(f"the tokenizer must give these tokens their numbers: {bundle.tokens.named()}.")
    return tuple(notes)


def report(bundle: Bundle, name: str, base: str, notes: tuple[str, ...]) -> LoadReport:
    """What was put on a model, and how its base was checked."""
    sizes = (len(bundle.sites), len(bundle.tensors), bundle.parameters)
    return LoadReport(bundle.folder, name, bundle.method.name, *sizes, base, notes)
