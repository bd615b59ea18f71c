"""What is attached to a model and which adapters act: one `State` a model, one assignment to switch.

A forward takes the selection by value when it starts and holds it in a frame until it ends, and a checkpointed layer
carries it into its recomputation, which may run on another thread and after the selection has changed. Frames live in
thread-local storage that only names what this thread is doing now; nothing is inherited through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import nn

from adapters._contract import Method, Site

STATE = "_adapter_state"  # the name, in a module's __dict__, of the model's State


@dataclass(frozen=True, eq=False)  # compared by identity: a swap makes a new Adapter of the same name
class Adapter:
    """One named set of tensors of one method on chosen sites. `slot` names its tensors inside the modules."""

    name: str
    slot: str
    method: Method
    sites: tuple[Site, ...]
    head: tuple[str, ...] = ()
    trainable: bool = False
    facts: Mapping[str, object] = field(default_factory=dict)


Selection: TypeAlias = tuple[Adapter, ...]


@dataclass(eq=False)
class State:
    """The adapters attached to one model, those that act, and what `detach` must give back."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # replaced whole, never changed in place
    active: Selection = ()
    required_grad: dict[str, bool] = field(default_factory=dict)  # of the base's parameters, before the first attach
    made: int = 0  # slots made so far; a slot is never used twice

    def new_slot(self) -> str:
        self.made += 1
        return f"s{self.made - 1}"


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[State, Selection]] = []
        self.taps: dict[int, torch.Tensor] = {}


_frames = _Frames()


def selection(state: State) -> Selection:
    """The adapters that act now, in this thread: those of the innermost frame of this model, else the active ones."""
    if not torch.compiler.is_compiling():  # dynamo cannot follow thread-local storage; compiled code reads the state
        for owner, held in reversed(_frames.stack):
            if owner is state:
                return held
    return state.active


class holding:
    """`with holding(state, chosen):` makes `chosen` this thread's selection, whatever others activate meanwhile."""

    __slots__ = ("frame",)

    def __init__(self, state: State, chosen: Selection) -> None:
        self.frame = (state, chosen)

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            _frames.stack.append(self.frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not torch.compiler.is_compiling():
            _frames.stack.pop()


def carrying(function: Callable[..., Any], state: State, chosen: Selection) -> Callable[..., Any]:
    """`function`, run under `chosen` whenever and on whatever thread it is called."""

    def carried(*args: Any, **kwargs: Any) -> Any:
        with holding(state, chosen):
            return function(*args, **kwargs)

    return carried


def put_tap(module: nn.Module, x: torch.Tensor) -> None:
    """Remembers the first argument of a tapped module until the branch that starts there ends."""
    _frames.taps[id(module)] = x


def take_tap(module: nn.Module) -> torch.Tensor | None:
    return _frames.taps.pop(id(module), None)


def state_of(model: nn.Module) -> State | None:
    """The model's State, or None when nothing is attached."""
    found = model.__dict__.get(STATE)
    return found if isinstance(found, State) else None


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by name, in the order in which they were attached."""
    state = state_of(model)
    return dict(state.adapters) if state is not None else {}
