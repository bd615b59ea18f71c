"""What all of PEFT's folders share: the names of their files' parts, trained heads, and which modules were named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters._attach import Tokens
from adapters._contract import Method, Site
from adapters._errors import DamagedAdapter
from adapters._interop.targets import base_modules, matched, suffix_of

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class FromPeft:
    """An adapter in our words: what `install` takes, the base that the folder claims to be for, what was converted."""

    method: Method
    sites: tuple[Site, ...]
    head: tuple[str, ...]
    tensors: dict[str, Tensor]
    base: str | None
    notes: tuple[str, ...] = ()
    tokens: Tokens | None = None


def head_paths(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The modules that PEFT's modules_to_save means."""
    saved = config.get("modules_to_save") or []
    return [path for path in base_modules(model) if any(suffix_of(str(name), path) for name in saved)]


def trained_heads(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, prefix: str = PREFIX
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Trained heads (PEFT's modules_to_save); whatever is left over after them is refused.

    Args:
        prefix: what their names in the file begin with.
    """
    paths = head_paths(config, model)
    trained: dict[str, Tensor] = {}
    head = set()
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        path = next((path for path in paths if name.startswith(f"{path}.")), None)
        if path is None:
            raise DamagedAdapter(f"the file holds {key}, which is no tensor of this adapter.")
        head.add(path)
        trained[f"{path}:head.{name.removeprefix(path + '.')}"] = tensor
    return tuple(sorted(head)), trained


def require_targets(config: Mapping[str, Any], found: set[str], owners: set[str]) -> None:
    """What the configuration names must be in the file: PEFT itself would start the missing ones afresh."""
    if not found:
        raise DamagedAdapter(f"the file holds no tensor of PEFT's {config['peft_type']}.")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    named = matched(config.get("target_modules"), owners)
    missing = sorted((named or set()) - found)
    saved = config.get("modules_to_save") or []
    missing = [path for path in missing if not any(suffix_of(name, path) for name in saved)]
    if missing:
        raise DamagedAdapter(f"the file lacks the tensors of {missing[0]}, which {CONFIG} names as a target.")
