"""What is attached to a model and which adapters act: one `State` a model, one assignment to switch.

A forward takes the selection by value when it starts and holds it in a frame until it ends, and a checkpointed layer
carries it into its recomputation, which may run on another thread and after the selection has changed. Frames live in
a context variable, so that threads and coroutines do not see each other's; nothing is inherited through it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import nn

from adapters._attach.bank import Key, Layout, Row
from adapters._attach.tokens import Tokens
from adapters._contract import Method, Site
from adapters._selection import Part
from adapters._sites import SiteMap

Chosen: TypeAlias = Part | tuple[Part, ...]  # a selection that can be a key
SHAPE = "shape"  # in the notes of a forward: of its batch
STATE = "_adapter_state"  # the name, in a module's __dict__, of the model's State
FACES = "_adapter_faces"  # the name, in a module's __dict__, of what its swapped class adds
ENTER = "enter"  # the face of the module that was attached to


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
    labels: Mapping[str, str] | None = None  # of its head
    tokens: Tokens | None = None  # whose rows it trains
    row: Row | None = None  # where its tensors are, if its entries hold none
    traits: Any = None  # Traits, which know of entries, and those of this module

    def at(self, entry: Any) -> Mapping[str, torch.Tensor]:
        """The tensors of this adapter at one of its entries."""
        found: Mapping[str, torch.Tensor] = entry.own() if self.row is None else self.row.at(entry.site.path)
        return found


class Acting(tuple[Adapter, ...]):
    """The adapters that take part in a forward, and how.

    `node` is None where they act one after the other. `value` is the selection as the caller gave it.
    """

    node: Any = None
    value: Chosen = None
    numbers: Any = None  # of its rows in the tables, with the tables, once asked for
    separately: str = ""  # why the rows of a batch run by selection, where they differ and cannot be followed

    @classmethod
    def of(cls, adapters: Iterable[Adapter], value: Chosen, node: Any = None, separately: str = "") -> Acting:
        made = cls(adapters)
        made.node, made.value, made.separately = node, value, separately
        return made


NOBODY = Acting()


@dataclass(eq=False, slots=True)
class Resolved:
    """What selections used lately mean, while the adapters are these, and the nodes that their parts became."""

    selections: dict[Chosen, Acting] = field(default_factory=dict)
    nodes: dict[Part, Any] = field(default_factory=dict)


@dataclass(eq=False)
class State:
    """The adapters attached to one model, those that act, and what `detach` must give back."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # replaced whole, never changed in place
    active: Acting = NOBODY
    named: Mapping[str, Part] = field(default_factory=dict)  # compositions by name; replaced whole
    layouts: weakref.WeakValueDictionary[Key, Layout] = field(default_factory=weakref.WeakValueDictionary)
    resolved: Resolved = field(default_factory=Resolved)  # replaced whenever the adapters, or what names mean, change
    slots: int = 0  # of each layout's table; 0: rows are by themselves
    kinds: list[Layout] = field(default_factory=list)  # those with tables, which compiled code knows by their names
    moves: int = 0  # of rows in their tables, by a pool
    pool: Any = None  # which may keep rows elsewhere while they do not act
    tables: tuple[Any, ...] | None = None  # from which compiled code reads what acts; None: it looks at the selection
    stacked: weakref.ref[Any] | None = None  # the selection by row whose adapters' tensors were stacked last
    compiled: Acting | None = None  # what `using` chose, for compiled code, which cannot follow context variables
    required_grad: dict[str, bool] = field(default_factory=dict)  # of the base's parameters, before the first attach
    map: SiteMap | None = None  # of the base, once it was traced or an adapter brought it along
    base_path: str = ""  # of the base model below the heads, with a dot at its end
    labels: Mapping[str, str] | None = None  # the base's own, once an adapter has others
    inputs_require_grad: bool = False  # of the base, so that gradients reach the adapters at all
    made: int = 0  # slots made so far; a slot is never used twice

    def new_slot(self) -> str:
        self.made += 1
        return f"s{self.made - 1}"

    def rows(self) -> list[Row]:
        """The rows of memory of the adapters that have one."""
        return [adapter.row for adapter in self.adapters.values() if adapter.row is not None]

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"layouts": {}, "resolved": Resolved(), "stacked": None, "pool": None}
        return {**self.__dict__, **fresh}  # found again, and made anew

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """A copied or unpickled model needs from the process what the original had."""
        self.__dict__.update(fields)
        self.layouts = weakref.WeakValueDictionary({row.layout.key: row.layout for row in self.rows()})
        for row in self.rows():
            if row.layout.table is not None:
                row.layout.table.adopt(row)
        for restore in after_copy:
            restore(self)


after_copy: list[Callable[[State], None]] = []
Notes: TypeAlias = dict[str, Any]  # what the parts of one forward leave for each other
_frames: ContextVar[tuple[tuple[State, Acting, Notes], ...]] = ContextVar("frames", default=())


class _Forwards(threading.local):
    """The models whose forward is under way in this thread, and what their tapped modules received."""

    def __init__(self) -> None:
        self.running: list[State] = []
        self.taps: dict[int, torch.Tensor] = {}


_forwards = _Forwards()


def selection(state: State) -> Acting:
    """The adapters that act now: those of this context's innermost frame of this model, else the active ones."""
    if torch.compiler.is_compiling():
        return state.active if state.compiled is None else state.compiled
    for owner, held, _ in reversed(_frames.get()):
        if owner is state:
            return held
    return state.active


def tables(state: State) -> tuple[Any, ...] | None:
    """The tables from which compiled code reads what acts; None where it is not compiled, or they do not tell."""
    return state.tables if torch.compiler.is_compiling() else None


def notes(state: State) -> Notes:
    """What the parts of the forward that is under way in this context leave for each other."""
    return next((kept for owner, _, kept in reversed(_frames.get()) if owner is state), {})


class holding:
    """`with holding(state, chosen):` makes `chosen` this context's selection, whatever others activate meanwhile."""

    __slots__ = ("chosen", "frame", "notes", "report", "state")

    def __init__(self, state: State, chosen: Acting, notes: Notes | None = None, report: Any = None) -> None:
        self.state, self.chosen, self.notes = state, chosen, {} if notes is None else notes
        self.report = report

    def __enter__(self) -> Any:
        if not torch.compiler.is_compiling():
            self.frame = (self.state, self.chosen, self.notes)
            _frames.set((*_frames.get(), self.frame))
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not torch.compiler.is_compiling():
            # by identity: a suspended generator may leave after a frame that was entered later
            _frames.set(tuple(frame for frame in _frames.get() if frame is not self.frame))


class choosing(holding):
    """`holding` for callers: compiled code sees the choice too, in every thread, where `point` shows it."""

    __slots__ = ("before", "held", "point")

    def __init__(self, state: State, chosen: Acting, point: Callable[[State, Acting], None], report: Any) -> None:
        super().__init__(state, chosen, report=report)
        self.point = point
        self.held: tuple[Any, ...] = ()  # what a pool keeps in memory for it

    def __enter__(self) -> Any:
        self.before, self.state.compiled = self.state.compiled, self.chosen
        self.point(self.state, self.chosen)
        if self.state.pool is not None:
            self.held = self.state.pool.hold(self.chosen)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state.compiled = self.before
        for entry in self.held:
            entry.held -= 1
        self.point(self.state, self.state.active if self.before is None else self.before)
        super().__exit__(kind, error, trace)


class reading:
    """`with reading(state, acting):` around a forward: what a pool takes out meanwhile is not written over."""

    __slots__ = ("acting", "pool", "rows")

    def __init__(self, state: State, acting: Acting) -> None:
        self.pool, self.acting = state.pool, acting

    def __enter__(self) -> None:
        self.rows = self.pool.reading(self.acting) if self.pool is not None else ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rows:
            self.pool.read(self.rows)


def is_outermost(state: State) -> bool:
    """Whether no forward of the model is under way in this thread."""
    return not any(other is state for other in _forwards.running)


class running:
    """`with running(state) as outermost:` around a forward; the taps of one that failed end with it."""

    __slots__ = ("state",)

    def __init__(self, state: State) -> None:
        self.state = state

    def __enter__(self) -> bool:
        outermost = is_outermost(self.state)
        _forwards.running.append(self.state)
        return outermost

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _forwards.running.pop()
        if not _forwards.running:
            _forwards.taps.clear()


def carrying(function: Callable[..., Any], state: State, chosen: Acting) -> Callable[..., Any]:
    """`function`, run under `chosen` and this forward's notes, whenever and on whatever thread it is called."""
    kept = dict(notes(state))  # the forward may have ended, and cleared them, when a layer is computed again

    def carried(*args: Any, **kwargs: Any) -> Any:
        with holding(state, chosen, kept):
            return function(*args, **kwargs)

    return carried


def put_tap(module: nn.Module, x: torch.Tensor) -> None:
    """Remembers the first argument of a tapped module until the branch that starts there ends."""
    _forwards.taps[id(module)] = x


def tapped(module: nn.Module) -> torch.Tensor | None:
    """What a tapped module received."""
    return _forwards.taps.get(id(module))


def drop_tap(module: nn.Module) -> None:
    """The branch has ended: nothing needs its input any more."""
    _forwards.taps.pop(id(module), None)


_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers."""
    while True:
        inner, held = model._modules.get("_orig_mod"), model._modules.get("module")
        if inner is None and held is not None and isinstance(model, _PARALLEL):
            inner = held
        if inner is None:
            return model
        model = inner


def state_of(model: nn.Module) -> State | None:
    """The model's State, or None when nothing is attached to it, as the root."""
    model = unwrapped(model)
    found = model.__dict__.get(STATE)
    return found if isinstance(found, State) and ENTER in model.__dict__.get(FACES, ()) else None


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by name, in the order in which they were attached."""
    state = state_of(model)
    return dict(state.adapters) if state is not None else {}
