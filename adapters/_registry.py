"""Methods by name: our own, those of installed plugins (entry points), and those registered while running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from adapters._contract import Method
from adapters._errors import AdapterError, nearest

GROUP = "adapters.methods"
M = TypeVar("M", bound=type[Method])
_added: dict[str, type[Method]] = {}


def add(name: str) -> Callable[[M], M]:
    """Registers a method class under `name`; use as a decorator above `@dataclass(frozen=True)`.

    Raises:
        AdapterError: the class is not a frozen dataclass derived from a kind of method, or the name is taken.
    """

    def register(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method) and cls.kind):
            raise AdapterError(f"{cls!r} is not a method: derive it from WeightMethod, StreamMethod or KeyValueMethod.")
        if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise AdapterError(f"method {name!r} must be a frozen dataclass: put @dataclass(frozen=True) below @add.")
        taken = _added.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise AdapterError(f"the method name {name!r} is taken by {taken.__module__}.{taken.__qualname__}.")
        cls.name = name
        _added[name] = cls
        return cls

    return register


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Names of all methods: built in, installed as plugins, or added in this process; sorted."""
    return sorted({*_entry_points(), *_added})


def get(name: str) -> type[Method]:
    """The method class called `name`, imported on first use.

    Raises:
        AdapterError: no method has that name; the sentence lists those that exist.
    """
    if name not in _added and name in _entry_points():
        loaded = _entry_points()[name].load()
        if name not in _added:  # a plugin may leave out the decorator: the entry point names the method
            add(name)(loaded)
    if name not in _added:
        raise AdapterError(f"no method {name!r}{nearest(name, names())} Methods here: {', '.join(names())}.")
    return _added[name]


def source(name: str) -> str:
    """The distribution or module that provides a method, for listings."""
    entry = _entry_points().get(name)
    return entry.dist.name if entry is not None and entry.dist is not None else get(name).__module__
