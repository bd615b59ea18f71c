"""PEFT names modules by suffixes: which suffixes mean exactly these modules, and which modules do suffixes mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the base by path, without what is attached to them."""
    return dict(_walk(model, ""))


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if path:
        yield path, module
    for name, child in module.named_children():
        if not getattr(child, "is_adapter_container", False):
            yield from _walk(child, f"{path}.{name}" if path else name)


def shortest(wanted: Collection[str], names: Collection[str]) -> list[str] | None:
    """The shortest suffixes that together match all of `wanted` and nothing else in `names`; None if there are none."""
    others = set(names) - set(wanted)
    chosen: set[str] = set()
    for path in sorted(wanted):
        if any(suffix_of(suffix, path) for suffix in chosen):
            continue
        parts = path.split(".")
        suffixes = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        found = next((s for s in suffixes if not any(suffix_of(s, other) for other in others)), None)
        if found is None:
            return None
        chosen.add(found)
    return sorted(chosen)


def suffix_of(suffix: str, path: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def matched(targets: Any, names: Collection[str]) -> set[str] | None:
    """The modules that PEFT's `target_modules` means among `names`; None where that depends on more than names."""
    if isinstance(targets, list):
        return {name for name in names if any(suffix_of(str(target), name) for target in targets)}
    if isinstance(targets, str) and targets != "all-linear" and len(targets) < 1000:
        try:
            return {name for name in names if re.fullmatch(targets, name)}
        except re.error:
            return None
    return None
