"""Compositions that have a name, and what depends on a name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from adapters._attach.choose import resolve
from adapters._attach.compiled import point
from adapters._attach.labels import show_labels
from adapters._attach.state import NOBODY, Resolved, State
from adapters._contract import FusionMethod
from adapters._errors import AdapterError
from adapters._selection import Part, Selection, names_in


def names_used(state: State, selection: Selection) -> set[str]:
    """Every name that a selection means: in it, in the compositions that it names, and in fusions."""
    found: set[str] = set()
    todo = list(names_in(selection))
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += names_in(state.named.get(name))
        adapter = state.adapters.get(name)
        if adapter is not None and isinstance(adapter.method, FusionMethod):
            todo += adapter.method.parts
    return found


def check_unused(state: State, name: str) -> None:
    """Refuses to take out what others are made of."""
    for user in _users(state):
        if user != name and name in names_used(state, user):
            raise AdapterError(f"{user!r} is made of {name!r}: detach {user!r} first.")


def _users(state: State) -> Iterator[str]:
    yield from state.named
    yield from (name for name, adapter in state.adapters.items() if isinstance(adapter.method, FusionMethod))


def give_name(state: State, name: str, composition: Part) -> None:
    """Lets `name` mean a composition.

    Raises:
        AdapterError: the name is taken, or the composition cannot act.
    """
    if name in state.adapters or name in state.named:
        raise AdapterError(f"the name {name!r} is taken on this model: detach it, or choose another one.")
    resolve(state, composition)
    state.named = {**state.named, name: composition}
    state.resolved = Resolved()


def forget(model: nn.Module, state: State, name: str) -> None:
    """Takes the name from a composition; its parts stay."""
    check_unused(state, name)
    if name in names_used(state, state.active.value):
        state.active = NOBODY
        point(state, NOBODY)
        show_labels(model, state, state.active)
    state.named = {key: value for key, value in state.named.items() if key != name}
    state.resolved = Resolved()
