"""Puts an adapter's tensors into a model and takes them out again: everything is checked and made before the model
changes, so that a refusal leaves it as it was.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from adapters._attach import injection
from adapters._attach.choose import resolve
from adapters._attach.compiled import point
from adapters._attach.container import Container
from adapters._attach.entries import adapter_tensors, drop_slot, place
from adapters._attach.inputs import input_embeddings
from adapters._attach.labels import labels_of, show_labels
from adapters._attach.names import check_unused, forget, names_used
from adapters._attach.positions import require_positions
from adapters._attach.rowed import prepared, release
from adapters._attach.state import ENTER, FACES, NOBODY, STATE, Adapter, Resolved, State, state_of, unwrapped
from adapters._attach.swap import CHECKPOINT, INPUT, PREPARE, STATISTICS, add_faces, strip
from adapters._attach.tokens import Tokens
from adapters._contract import KeyValueMethod, Method, Site
from adapters._errors import AdapterError
from adapters._fourbit import guard_against_repacking
from adapters._heads import base_model
from adapters._selection import Selection
from adapters._sharded import is_sharded
from adapters._sites import SiteMap


def install(
    model: nn.Module,
    name: str,
    method: Method,
    sites: Iterable[Site],
    tensors: Mapping[str, Tensor],
    *,
    head: Iterable[str] = (),
    trainable: bool = False,
    activate: bool = True,
    facts: Mapping[str, object] | None = None,
    labels: Mapping[str, str] | None = None,
    tokens: Tokens | None = None,
    map: SiteMap | None = None,
    banked: bool = False,
) -> Adapter:
    """Adds an adapter whose tensors exist already, keyed as `tensors_of` gives them.

    `banked` puts them into one row of memory that is not among the model's parameters, if the adapter is frozen and
    has neither a head nor tokens.

    Raises:
        AdapterError: the name is taken, a site does not exist in this model, or tensors are missing or superfluous.
    """
    check_attachable(model, name)
    model, sites = unwrapped(model), tuple(sites)
    require_positions(model, method, sites)
    found = state_of(model)
    state = found if found is not None else State(required_grad=_flags(model))
    guard_against_repacking(model)
    labels, fixed = labels if head else None, (method, tuple(sites), tuple(head))
    whole = Adapter(name, "", *fixed, trainable, dict(facts or {}), labels, tokens)
    adapter, made = prepared(model, state, whole, tensors, banked)
    before = state.active.value
    try:
        if found is None:
            _enter(model, state)
        place(model, state, made, trainable)
        _inject(state, adapter)
        state.map = map or state.map
        show(model, state, {**state.adapters, name: adapter}, name if activate else before)
    except BaseException:  # an interrupt, whose moment nobody chooses
        _take_out(model, state, adapter)
        if state.adapters:
            show(model, state, state.adapters, before)
        raise
    return adapter


def show(model: nn.Module, state: State, attached: Mapping[str, Adapter], active: Selection) -> None:
    """Makes these the attached adapters, and `active` what acts of them: nothing in here takes long."""
    state.adapters = attached
    if state.labels is None and any(adapter.labels for adapter in attached.values()):
        state.labels = labels_of(model)
    state.resolved = Resolved()
    for name in state.named:  # what is made of an exchanged adapter must still have a meaning
        resolve(state, name)
    state.active = resolve(state, active)
    point(state, state.active)
    show_labels(model, state, state.active)


def check_attachable(model: nn.Module, name: str) -> None:
    """Refuses a name that is taken, and a model that is, or holds, a part of another attached model."""
    model = unwrapped(model)
    state = state_of(model)
    if state is not None and (name in state.adapters or name in state.named):
        raise AdapterError(f"an adapter {name!r} is attached already: detach or swap it, or choose another name.")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise AdapterError("this model is sharded already: attach first, then shard, so that the adapter is as well.")
    for path, module in model.named_modules():
        if module.__dict__.get(STATE, state) is not state:
            where = f"its part {path}" if path else "a larger model of which this is a part"
            raise AdapterError(f"adapters are attached to {where}: attach to one and the same model, or detach there.")


def replace(
    model: nn.Module,
    name: str,
    method: Method,
    sites: Iterable[Site],
    tensors: Mapping[str, Tensor],
    *,
    head: Iterable[str] = (),
    facts: Mapping[str, object] | None = None,
    labels: Mapping[str, str] | None = None,
    tokens: Tokens | None = None,
    banked: bool = False,
) -> Adapter:
    """Exchanges an attached adapter in one step. A forward under way goes on with the version that it began with."""
    state, old = _attached(model, name)
    model = unwrapped(model)
    labels, fixed = labels if head else None, (method, tuple(sites), tuple(head))
    whole = Adapter(name, "", *fixed, old.trainable, dict(facts or {}), labels, tokens)
    if old.row is not None and old.row.keeper is not None:
        old.row.keeper.room_for(old.row, sum(tensor.nbytes for tensor in tensors.values()))
    new, made = prepared(model, state, whole, tensors, banked)
    before, selected = state.adapters, state.active.value
    try:
        place(model, state, made, old.trainable)
        _inject(state, new)
        show(model, state, {**before, name: new}, selected)
    except BaseException:  # as where the new one cannot act in the selection that is active
        show(model, state, before, selected)
        release(model, state, new, before.values())
        raise
    if old.row is not None and new.row is not None and old.row.keeper is not None:
        old.row.keeper.follow(old.row, new.row)
    if old.row is None:
        # whoever is still running the old version holds a reference to it; its tensors go when the last one ends
        weakref.finalize(old, _drop_slot, weakref.ref(model), old.slot).atexit = False
    return new


def remove(model: nn.Module, name: str) -> None:
    """Takes one adapter out; with the last one the model gets every class, flag and key back.

    A composition of that name is forgotten. Where the adapter is a part of what is active, nothing is, afterwards.

    Raises:
        AdapterError: no such adapter is attached, or it is a part of a composition that has a name, or of a fusion.
    """
    state = state_of(model)
    if state is not None and name in state.named:
        forget(unwrapped(model), state, name)
        return
    state, adapter = _attached(model, name)
    check_unused(state, name)
    _take_out(unwrapped(model), state, adapter)


def _take_out(model: nn.Module, state: State, adapter: Adapter) -> None:
    """May be interrupted and called again: the adapter is forgotten, and the root given back, at the very end."""
    others = {name: other for name, other in state.adapters.items() if other is not adapter}
    if adapter.name in names_used(state, state.active.value) and adapter in state.adapters.values():
        state.active = NOBODY
        point(state, NOBODY)
        show_labels(model, state, state.active)
    release(model, state, adapter, others.values())
    if not any(isinstance(other.method, KeyValueMethod) for other in others.values()):
        injection.withdraw(state)
    if not others:
        for path, parameter in base_parameters(model).items():
            parameter.requires_grad_(state.required_grad.get(path, parameter.requires_grad))
        for module in list(model.modules())[1:]:
            if FACES in module.__dict__:
                strip(module)
    state.adapters, state.resolved = others, Resolved()
    if not others and FACES in model.__dict__:
        strip(model)


def set_trainable(model: nn.Module, name: str, trainable: bool) -> Adapter:
    """Lets an attached adapter's tensors, its heads' included, train from now on, or freezes them."""
    state, old = _attached(model, name)
    if old.row is not None:
        return _unbanked(model, state, old) if trainable else old
    new = dataclasses.replace(old, trainable=trainable)
    for parameter in adapter_tensors(unwrapped(model), old).values():
        parameter.requires_grad_(trainable)
    show(unwrapped(model), state, {**state.adapters, name: new}, state.active.value)
    return new


def _unbanked(model: nn.Module, state: State, old: Adapter) -> Adapter:
    """Gives an adapter whose tensors are in a row parameters of its own, which train."""
    model, before = unwrapped(model), state.adapters
    tensors = {key: tensor.clone() for key, tensor in adapter_tensors(model, old).items()}
    new, made = prepared(model, state, dataclasses.replace(old, trainable=True, row=None), tensors, banked=False)
    place(model, state, made, trainable=True)
    show(model, state, {**before, old.name: new}, state.active.value)
    return new


def tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by `f"{site.path}:{tensor}"`, `f"{head}:head.{parameter}"` and `f"{table}:tokens.rows"`."""
    return adapter_tensors(unwrapped(model), _attached(model, name)[1])


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by path, each once, without those of attached adapters."""
    ours = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Container)
        for parameter in module.parameters()
    }
    return {path: parameter for path, parameter in model.named_parameters() if id(parameter) not in ours}


def _attached(model: nn.Module, name: str) -> tuple[State, Adapter]:
    state = state_of(model)
    if state is None or name not in state.adapters:
        there = ", ".join(state.adapters) if state is not None else "none"
        raise AdapterError(f"no adapter {name!r} is attached; attached: {there}.")
    return state, state.adapters[name]


def _drop_slot(model: weakref.ref[nn.Module], slot: str) -> None:
    alive = model()
    if alive is not None:
        drop_slot(alive, slot)


def _flags(model: nn.Module) -> dict[str, bool]:
    return {path: parameter.requires_grad for path, parameter in model.named_parameters()}


def _enter(model: nn.Module, state: State) -> None:
    add_faces(model, state, ENTER)
    below = base_model(model)
    if below is not None and below is not model:
        add_faces(below, state, PREPARE)
        state.base_path = next(f"{path}." for path, module in model.named_modules() if module is below)
    for module in list(input_embeddings(model)):
        add_faces(module, state, INPUT)
    for module in list(model.modules()):
        # a data descriptor outlives `gradient_checkpointing_enable()`, which sets the function anew on every module
        if hasattr(module, "gradient_checkpointing"):
            add_faces(module, state, CHECKPOINT)
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
            add_faces(module, state, STATISTICS)  # no adapter's file holds them
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _inject(state: State, adapter: Adapter) -> None:
    if isinstance(adapter.method, KeyValueMethod):
        injection.provide(state)
