"""Training adapters: trainers over rows of any shape, and recipes, YAML files that each hold a complete run.

Every public name is imported on first use, so that reading a recipe loads neither transformers nor trl.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import adapters._bridge  # noqa: F401 - an attached model is a PeftModel, whichever package was asked first
from adapters._trainers import newest_checkpoint

if TYPE_CHECKING:
    from adapters.train.ahead import try_out
    from adapters.train.instruction import InstructionTrainer
    from adapters.train.packing import Packing, probe_packing
    from adapters.train.reading import read_recipe
    from adapters.train.recipe import Data, Evaluation, Recipe, Training
    from adapters.train.sft import SFTTrainer
    from adapters.train.unpadding import Unpadded, unpad
    from adapters.train.watchdog import Watchdog

_WHERE = {
    "ahead": "try_out",
    "instruction": "InstructionTrainer",
    "packing": "Packing probe_packing",
    "reading": "read_recipe",
    "recipe": "Data Evaluation Recipe Training",
    "sft": "SFTTrainer",
    "unpadding": "Unpadded unpad",
    "watchdog": "Watchdog",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}

__all__ = [
    "Data",
    "Evaluation",
    "InstructionTrainer",
    "newest_checkpoint",
    "Packing",
    "probe_packing",
    "read_recipe",
    "Recipe",
    "SFTTrainer",
    "Training",
    "try_out",
    "unpad",
    "Unpadded",
    "Watchdog",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'adapters.train' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"adapters.train.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "datasets", "accelerate"):
            raise
        raise ModuleNotFoundError(
            f'adapters.train.{name} needs the package {error.name}: pip install "adapter-registry[train]".',
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
