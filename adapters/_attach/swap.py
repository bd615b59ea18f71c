"""Changes what a module does by changing its class, and nothing else: parameters, keys and identity stay.

Each adapted module gets a cached subclass of its own class. An override of `__call__` runs after everything that
others hang on `forward` (accelerate's instance-level forward, hooks), and is seen by torch.compile.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from adapters._attach.at_module import changed, read_under, scaled_arguments
from adapters._attach.batches import GENERATE, bound, by_selection, of_generate, padding, refuse_in_compiled_code
from adapters._attach.chain import without_container
from adapters._attach.container import CHILD, Container
from adapters._attach.inputs import input_call, is_cut_off
from adapters._attach.inside import WRITTEN, written_call
from adapters._attach.joined import together
from adapters._attach.moved import moving
from adapters._attach.recomputed import get_checkpointing, set_checkpointing
from adapters._attach.signature import forward_parameters
from adapters._attach.state import (
    ENTER,
    FACES,
    STATE,
    Acting,
    State,
    holding,
    is_outermost,
    notes,
    put_tap,
    reading,
    running,
    selection,
    tables,
)
from adapters._attach.table import changed_by_table
from adapters._attach.virtual import entry_call, layer_call
from adapters._fourbit import stored_or_packed
from adapters._sharded import is_sharded

BASE = "_adapter_base_class"
# faces: what a subclass adds, beside ENTER
PREPARE = "prepare"  # the base model below the root's heads, which may be called by itself
CALL = "call"
SCALED = "scaled"  # a call whose input is scaled
TAP = "tap"
INPUT = "input"  # input embeddings
CHECKPOINT = "checkpoint"
TAPPED_BY = "_adapter_tapped_by"  # in a tapped module's __dict__: the slots that read its input
TOKENS = "tokens"  # is given the tokens, among which virtual ones are inserted
LAYER = "layer"  # overwrites virtual tokens
STATISTICS = "statistics"  # running ones, which stay as they are while the base is frozen
HOLD = "hold"  # holds tensors that others use
READ = "read:"  # followed by a parameter's name

save_attached: Callable[[nn.Module, str, bool], None] | None = None  # set by the store, which is imported after this
# faces that others provide, by name: which modules have them (ENTER or PREPARE), and how to make, of such a module's
# class, the class that has the face as well
further_faces: dict[str, tuple[str, Callable[[type[nn.Module]], type[nn.Module]]]] = {}
roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every attached model of this process
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a forward
before_forward: list[Callable[[nn.Module, State, tuple[Any, ...], dict[str, Any]], Call]] = []


def adapted_class(base: Any, faces: frozenset[str]) -> type[nn.Module]:
    """The subclass of `base` with these faces, and those that others provide for them in this process."""
    return _made_class(base, faces, frozenset(face for face, (where, _) in further_faces.items() if where in faces))


@cache
def _made_class(base: Any, faces: frozenset[str], further: frozenset[str]) -> type[nn.Module]:
    """It keeps the base's name and module, so that reprs and configs agree."""
    space: dict[str, Any] = {
        BASE: base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": lambda self, protocol: (_restore, (base, faces), self.__dict__),
    }
    if issubclass(base, nn.Sequential):
        space |= without_container(base)
    if {CALL, SCALED, TAP} & faces:
        space["__call__"] = _site_call(_scaling_call(base) if SCALED in faces else base.__call__, TAP in faces)
    for face in faces:
        if face.startswith(WRITTEN):
            inner = space.get("__call__", base.__call__)
            space["__call__"] = written_call(inner, int(face.removeprefix(WRITTEN)))
    if LAYER in faces:
        space["__call__"] = layer_call(space.get("__call__", base.__call__))
    if TOKENS in faces:
        space["__call__"] = entry_call(space.get("__call__", base.__call__))
    if INPUT in faces:
        space["__call__"] = input_call(space.get("__call__", base.__call__))
    if ENTER in faces or PREPARE in faces:
        space["__call__"] = _root_call(space.get("__call__", base.__call__), ENTER in faces)
    if ENTER in faces:
        space["_apply"] = moving(base._apply)
        if hasattr(base, "generate"):
            space["generate"] = _root_generate(base.generate)
        if hasattr(base, "save_pretrained"):
            space["save_pretrained"] = _save_pretrained
        if hasattr(base, "_hf_peft_config_loaded"):
            space["_hf_peft_config_loaded"] = property(_trains_on_a_quantised_base)
    if CHECKPOINT in faces:
        space["_gradient_checkpointing_func"] = property(get_checkpointing, set_checkpointing)
    if STATISTICS in faces:
        space["training"] = property(lambda self: False, lambda self, mode: self.__dict__.update(training=mode))
    for face in faces:
        if face.startswith(READ):
            space[face.removeprefix(READ)] = property(_reader(face.removeprefix(READ)))
    made: type[nn.Module] = type(base.__name__, (base,), space)
    for face in sorted(further):
        made = further_faces[face][1](made)
    return made


def _restore(base: Any, faces: frozenset[str]) -> nn.Module:
    """Pickle finds classes by name; a swapped one is made again from its base."""
    # in a new process nothing has asked for a public name yet, which is what brings saving and the bridge along
    assert importlib.import_module("adapters").attach is not None
    cls = adapted_class(base, faces)
    module = cls.__new__(cls)
    if ENTER in faces:
        roots.add(module)
    return module


def add_faces(module: nn.Module, state: State, *faces: str) -> None:
    """Gives `module` further faces; its own class stays reachable."""
    base = base_class(module)
    have = module.__dict__.get(FACES, frozenset())
    module.__dict__[STATE] = state
    module.__dict__[FACES] = have | frozenset(faces)
    module.__class__ = adapted_class(base, module.__dict__[FACES])
    if ENTER in faces:
        roots.add(module)


def strip(module: nn.Module) -> None:
    """Gives a module its own class back and takes everything away that attaching put there."""
    module.__class__ = base_class(module)
    roots.discard(module)
    for key in (STATE, TAPPED_BY, FACES):
        module.__dict__.pop(key, None)
    if CHILD in module._modules and isinstance(module._modules[CHILD], Container | None):
        del module._modules[CHILD]


def base_class(module: nn.Module) -> Any:
    """A module's class as it was before it was swapped. Any: mypy takes no class of modules for hashable."""
    return getattr(type(module), BASE, type(module))


def _site_call(base_call: Callable[..., Any], tapped: bool) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)  # None: detached while a compiled caller still knows this class
        y = together(self, state, args, kwargs) if not tapped else None
        if y is not None:
            return y
        y = base_call(self, *args, **kwargs)
        if state is not None and (numbered := tables(state)) is not None:
            if tapped:
                put_tap(self, args[0] if args else next(iter(kwargs.values())))
            held = self._modules.get(CHILD)
            return y if held is None else changed_by_table(numbered, held._modules, args, kwargs, y)
        acting = selection(state) if state is not None else ()
        if not acting:
            return y
        if tapped and any(adapter.slot in self.__dict__[TAPPED_BY] for adapter in acting):
            put_tap(self, args[0] if args else next(iter(kwargs.values())))
        held = self._modules.get(CHILD)
        return y if held is None or state is None else changed(state, acting, held._modules, args, kwargs, y)

    return __call__


def _scaling_call(base: type[nn.Module]) -> Callable[..., Any]:
    """The base's call on an input that the acting adapters scale; the other adapters see it as it was."""
    base_call = base.__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state, held = self.__dict__.get(STATE), self._modules.get(CHILD)
        acting = selection(state) if state is not None and tables(state) is None else ()
        if acting and held is not None and state is not None:
            args, kwargs = scaled_arguments(state, acting, held._modules, args, kwargs)
        return base_call(self, *args, **kwargs)

    return __call__


def _root_call(inner: Callable[..., Any], root: bool) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: State | None = self.__dict__.get(STATE)
        if state is None:
            return inner(self, *args, **kwargs)
        if tables(state) is not None:
            return inner(self, *args, **kwargs)
        acting = selection(state)
        if torch.compiler.is_compiling():
            refuse_in_compiled_code(acting)
            args, kwargs = _prepared(self, state, args, kwargs) if root and acting else (args, kwargs)
            return inner(self, *args, **kwargs)
        kept = notes(state)
        if acting.node is not None and is_outermost(state):
            names = forward_parameters(base_class(self))
            if (whole := by_selection(state, acting, names)) is not None:
                return whole(partial(__call__, self), args, kwargs)
            acting = bound(state, acting, kept, names, args, kwargs)
        with holding(state, acting, kept), reading(state, acting), running(state) as outermost:
            if acting and outermost:
                args, kwargs = _prepared(self, state, args, kwargs)
            result = inner(self, *args, **kwargs)
            if (outermost or not root) and _needs_input_grads(state, acting, result, "" if root else state.base_path):
                state.inputs_require_grad = True
                result = inner(self, *args, **kwargs)
            return result

    return __call__


def _needs_input_grads(state: State, acting: Acting, result: Any, part: str) -> bool:
    """Whether what should train is cut off from the adapters inside `part`: it is run again, once in a model's life."""
    if state.inputs_require_grad or not torch.is_grad_enabled() or not is_cut_off(result):
        return False
    return any(adapter.trainable and any(site.path.startswith(part) for site in adapter.sites) for adapter in acting)


def _prepared(model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    for prepare in before_forward:
        args, kwargs = prepare(model, state, args, kwargs)
    return args, kwargs


def _root_generate(inner: Callable[..., Any]) -> Callable[..., Any]:
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: State | None = self.__dict__.get(STATE)
        if state is None:
            return inner(self, *args, **kwargs)
        acting = selection(state)
        if acting.node is not None:
            whole = by_selection(state, acting, GENERATE, lambda: padding(self, kwargs))
            if whole is not None:
                return whole(partial(generate, self), args, kwargs)
        with holding(state, acting, of_generate(acting, args, kwargs)):
            return inner(self, *args, **kwargs)

    generate.__doc__ = inner.__doc__
    return generate


def _save_pretrained(self: nn.Module, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """Writes the attached adapters only; `adapters.detach` first, or `adapters.merge`, to save the whole model."""
    assert save_attached is not None, "adapters._store is imported together with every public function"
    save_attached(self, str(save_directory), bool(kwargs.get("is_main_process", True)))


def _trains_on_a_quantised_base(self: nn.Module) -> bool:
    """What transformers' Trainer asks of a base that transformers has quantised, whether or not peft is installed."""
    return getattr(self, "hf_quantizer", None) is not None


def _reader(parameter: str) -> Callable[[nn.Module], Any]:
    def read(self: nn.Module) -> Any:
        raw = stored_or_packed(self._parameters[parameter])
        stored: Any = raw
        held, state = self._modules.get(CHILD), self.__dict__.get(STATE)
        if not torch.compiler.is_compiling() and is_sharded(raw):
            return raw  # its owner is not running: FSDP2 itself asks (`divided` has refused all else)
        if held is not None and state is not None and tables(state) is None:
            stored = read_under(selection(state), held._modules, parameter, stored, raw)
        return stored

    return read
