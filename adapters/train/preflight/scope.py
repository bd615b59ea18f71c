"""What trains and what should not: the adapter and nothing else, acting, finite, on the base it was made for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from torch import nn

from adapters._attach import Adapter, adapters_of, base_parameters, state_of
from adapters._attach.swap import base_class
from adapters._contract import WeightSite
from adapters._errors import AdapterError
from adapters._finite import finite
from adapters._fourbit import shape_of
from adapters._store import commit
from adapters._store.bundle import RECORD
from adapters._store.fingerprints import check as same_base
from adapters._store.record import decode
from adapters.train.preflight.places import Place, acting, named, trained
from adapters.train.preflight.report import Check, count, failed, ok, some, warning

TRAIN = "adapters.attach a new adapter, or adapters.load(..., trainable=True), before training"


def scope_checks(model: nn.Module, name: str | None) -> tuple[tuple[Place, ...], list[Check]]:
    """The places that this run trains, and what is wrong with them."""
    every, act = trained(model, name), acting(model)
    subjects = tuple(place for place in every if place.adapter in act)
    checks = [_trains(model, every, subjects, act, name)]
    checks += [_base_is_frozen(model)] if adapters_of(model) else []
    chosen = {place.adapter for place in subjects}
    idle = [a.name for a in adapters_of(model).values() if a not in chosen and trained(model, a.name)]
    if subjects and idle:
        what = f"{some(map(repr, idle))} can train but does not act: DistributedDataParallel waits for its gradients"
        checks.append(warning(what, "adapters.detach it, or set requires_grad_(False) on its tensors"))
    return subjects, checks


def _trains(
    model: nn.Module, every: Sequence[Place], subjects: Sequence[Place], act: Sequence[Adapter], name: str | None
) -> Check:
    if not adapters_of(model):
        return failed("no adapter is attached: there is nothing to train", TRAIN)
    if not every:
        who = some(repr(adapter.name) for adapter in named(model, name))
        return failed(f"no tensor of {who} requires a gradient: it is frozen", TRAIN)
    names = list(dict.fromkeys(place.adapter.name for place in every))
    if not subjects:
        acts = some(repr(adapter.name) for adapter in act) if act else "none"
        what = f"what can train, {some(map(repr, names))}, does not act; acting: {acts}"
        return failed(what, f"adapters.activate(model, {names[0]!r})")
    size = sum(tensor.numel() for place in subjects for tensor in place.tensors.values() if tensor.requires_grad)
    who = some(dict.fromkeys(f"{place.adapter.name!r} ({place.adapter.method.name})" for place in subjects))
    return ok(f"{who} trains {size:,} parameters at {count(len(subjects), 'site')}")


def _base_is_frozen(model: nn.Module) -> Check:
    loose = [path for path, parameter in base_parameters(model).items() if parameter.requires_grad]
    if not loose:
        return ok("nothing outside the adapter requires a gradient")
    what = (
        f"{count(len(loose), 'parameter')} of the base require a gradient, which no adapter file holds: {some(loose)}"
    )
    return failed(
        what, "set requires_grad_(False) on them; adapters.attach(head=[...]) trains modules with the adapter"
    )


def value_checks(places: Sequence[Place]) -> list[Check]:
    """Values that are not finite, in what trains."""
    tensors = [(f"{place.path}:{name}", t) for place in places for name, t in place.tensors.items()]
    bad = [key for key, tensor in tensors if not finite(tensor.detach())]
    if not bad:
        return []
    what = f"{len(bad)} of {count(len(tensors), 'tensor')} of the adapter hold values that are not finite: {some(bad)}"
    return [failed(what, "load the last good checkpoint, or attach a fresh adapter")]


def base_checks(model: nn.Module, adapters: Sequence[Adapter], folder: str | os.PathLike[str] | None) -> list[Check]:
    """Whether the base is the adapter's: by its fingerprint where the folder is given, else by class and shapes."""
    state = state_of(model)
    here, known = base_class(model).__name__, state.map.model if state is not None and state.map is not None else None
    if known is not None and known != here:
        return [
            failed(f"the adapter's sites were found in a {known}, and this base is a {here}", "load the right base")
        ]
    parameters = base_parameters(model)
    sites = [site for adapter in adapters for site in adapter.sites if isinstance(site, WeightSite)]
    apart = [site.path for site in sites if not _same_size(site, parameters)]
    if apart:
        what = (
            f"{count(len(apart), 'weight')} of the base have not the shape that the adapter was made for: {some(apart)}"
        )
        return [
            failed(what, "the base was changed after attaching (resized embeddings?): change it first, then attach")
        ]
    if folder is not None:
        return [_recorded(model, folder)]
    return [ok(f"base: a {here} with the shapes the adapter was made for (its values are compared only when loading)")]


def _same_size(site: WeightSite, parameters: Mapping[str, nn.Parameter]) -> bool:
    stored = next((parameters[path] for path in (site.path, *site.aliases) if path in parameters), None)
    return stored is not None and math.prod(shape_of(stored)) == math.prod(site.shape)


def _recorded(model: nn.Module, folder: str | os.PathLike[str]) -> Check:
    try:
        with commit.reading(folder) as view:
            bundle = decode(view) if RECORD in view else None
        if bundle is None or bundle.base is None:
            what = f"the base cannot be compared: {os.fspath(folder)} has no record of the adapter's"
            return warning(what, "save the adapter once with adapters.save, which records its base")
        return ok(same_base(bundle.base, model, exclude=bundle.head))
    except AdapterError as error:
        return failed(f"base: {str(error).rstrip('.')}", "load the base that the adapter was trained on")
