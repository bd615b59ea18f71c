"""`Accelerator` with models that have adapters: checked by `prepare`, saved and loaded as adapter folders."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from adapters._trainers.distributed import check
from adapters._trainers.parts import require_frozen, restore_parts, save_parts
from adapters._trainers.trainer import attached_within

FOLDER = "adapters"
_HOOKED = "_adapters_hooked"


def extend() -> None:
    """Called once, when accelerate has been imported."""
    from accelerate.accelerator import Accelerator

    for name in ("save_state", "load_state"):
        setattr(Accelerator, name, _hooked(getattr(Accelerator, name)))
    Accelerator.prepare = _checked(Accelerator.prepare)


def _hooked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def with_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, _HOOKED) and any(attached_within(model) is not None for model in self._models):
            setattr(self, _HOOKED, True)
            self.register_save_state_pre_hook(functools.partial(_save, self))
            self.register_load_state_pre_hook(_load)
        return method(self, *args, **kwargs)

    return with_adapters


def _checked(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def with_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
        for each in args:
            found = attached_within(each)
            if found is not None:
                require_frozen(each)
                check(self, found)
        return prepare(self, *args, **kwargs)

    return with_adapters


def _save(accelerator: Any, models: list[Any], weights: list[Any], output_dir: str) -> None:
    """Writes the adapters of each model that has any, and takes its weights out of what is written besides."""
    for index in reversed(range(len(models))):
        found = attached_within(models[index])
        if found is not None:
            save_parts(models[index], _folder(output_dir, index), accelerator.is_main_process)
            if weights:
                del weights[index]


def _load(models: list[Any], input_dir: str) -> None:
    """Restores the adapters of each model that has any, and leaves the others for accelerate to load."""
    for index in reversed(range(len(models))):
        found = attached_within(models[index])
        if found is not None:
            restore_parts(models[index], _folder(input_dir, index))
            del models[index]


def _folder(state: str, index: int) -> str:
    return os.path.join(state, FOLDER if index == 0 else f"{FOLDER}_{index}")
