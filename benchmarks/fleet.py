"""Many adapters of one kind: their folders, and the same ones on a base of ours and on one of PEFT's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import adapters
from adapters._attach import tensors_of
from benchmarks.twins import NAME, Setting, shake

LORA8: dict[str, Any] = {"rank": 8, "alpha": 16.0}
OPTIONS: dict[str, dict[str, Any]] = {"lora": LORA8, "bottleneck": {}, "prefix": {"length": 16}}


@dataclass
class Fleet:
    """Models with the same adapters, named "0", "1", ..., and how long each took to load, in CPU seconds."""

    ours: Any = None
    theirs: Any = None
    seconds: dict[str, list[float]] = field(default_factory=dict)


_folders: dict[tuple[Path, str], list[Path]] = {}
_fleets: dict[tuple[Path, str], Fleet] = {}


def folders(setting: Setting, method: str, count: int) -> list[Path]:
    """At least `count` folders with adapters of one method, no two alike, made once a run."""
    made = _folders.setdefault((setting.scratch, method), [])
    if len(made) < count:
        model = setting.base(torch.float32)
        adapters.attach(model, method, name=NAME, **OPTIONS[method])
        fresh = {key: tensor.detach().clone() for key, tensor in tensors_of(model, NAME).items()}
        for i in range(len(made), count):
            for key, tensor in tensors_of(model, NAME).items():
                tensor.data.copy_(fresh[key])
            shake(model, seed=i)
            made.append(setting.folder(f"fleet-{method}-{i}"))
            adapters.save(model, NAME, made[i])
    return made


def timed(seconds: list[float], work: Callable[[], Any]) -> Any:
    start = time.process_time()
    found = work()
    seconds.append(time.process_time() - start)
    return found


def load_ours(model: Any, places: list[Path]) -> list[float]:
    """Loads every folder, none of them acting, and returns the CPU seconds of each."""
    seconds: list[float] = []
    for i, place in enumerate(places):
        timed(seconds, lambda: adapters.load(model, place, name=str(i), activate=False))  # noqa: B023 - called at once
    return seconds


def load_theirs(base: Any, places: list[Path]) -> tuple[Any, list[float]]:
    """The same with PEFT, by its faster way: without `low_cpu_mem_usage` it initialises what it then overwrites."""
    import peft

    seconds: list[float] = []
    fast = {"low_cpu_mem_usage": True}
    first, *others = map(str, places)
    model = timed(seconds, lambda: peft.PeftModel.from_pretrained(base, first, adapter_name="0", **fast))
    for i, place in enumerate(others, 1):
        timed(seconds, lambda: model.load_adapter(place, adapter_name=str(i), **fast))  # noqa: B023 - called at once
    return model.eval(), seconds


def fleet(setting: Setting, method: str = "lora", count: int | None = None) -> Fleet:
    """The models with all adapters, ours and, for LoRA, PEFT's, loaded once a run and kept for every row."""
    found = _fleets.setdefault((setting.scratch, method), Fleet())
    places = folders(setting, method, count or setting.adapters)[: count or setting.adapters]
    if found.ours is None:
        found.ours = setting.base(torch.float32)
        found.seconds["ours"] = load_ours(found.ours, places)
    if found.theirs is None and method == "lora":
        found.theirs, found.seconds["theirs"] = load_theirs(setting.base(torch.float32), places)
    return found


def keep(setting: Setting, method: str, **parts: Any) -> Fleet:
    """Lets rows share what one of them has loaded."""
    found = _fleets.setdefault((setting.scratch, method), Fleet())
    for name, part in parts.items():
        setattr(found, name, part)
    return found
