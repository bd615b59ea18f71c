"""What AdapterHub's library writes into a folder, and what all of its methods share there.

AdapterHub's distribution `adapters` (1.3.0; src/adapters/loading.py, configuration/model_adapters_config.py) writes
`adapter_config.json`: the method's options as `config`, and beside them name, version, and the model's name, type and
class. Tensors are called `<module>.adapters.<name>.<part>`, `<module>.loras.<name>.<part>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from adapters._contract import Method, Site
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import CONFIG
from adapters._interop.targets import base_modules
from adapters._sites.weights import block_of

ADDED = ("attention_adapters", "cross_attention_adapters", "output_adapters")  # modules that only AdapterHub has
# the containers of version 1, which AdapterHub renames as it loads them
LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}


@dataclass(frozen=True)
class HubFiles:
    """The contents of a folder that AdapterHub wrote."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    head_config: Mapping[str, Any] | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    interface: Mapping[str, Any] | None = None  # written where AdapterHub works by hooks instead of a port
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def base(self) -> str:
        """What it says it was made for."""
        return str(self.config.get("model_name") or f"a {self.config['model_type']} without a name")


@dataclass(frozen=True)
class FromHub:
    """An adapter of AdapterHub's in our words: what `install` takes."""

    method: Method
    sites: tuple[Site, ...]
    tensors: dict[str, Tensor]
    head: tuple[str, ...] = ()
    labels: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def is_hub(config: Any) -> bool:
    """Whether this is AdapterHub's configuration; PEFT's has the same file name and says its `peft_type`."""
    return isinstance(config, Mapping) and "peft_type" not in config and {"config", "model_type", "name"} <= set(config)


def by_owner(files: HubFiles, kind: str, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors by the module of this model that they belong to, and by their names there.

    Args:
        kind: the container, "adapters" or "loras".
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.tensors.items():
        owner, inside, part = _renamed(key).partition(f".{kind}.{files.name}.")
        if not inside:
            raise AdapterError(f"the file holds {key}, which is none of the tensors that AdapterHub keeps in {kind!r}.")
        found.setdefault(owner, {})[part] = tensor
    if not found:
        raise DamagedAdapter("the file holds no tensor of the adapter.")
    return {_here(owner, found, model): parts for owner, parts in found.items()}


def _renamed(key: str) -> str:
    for old, new in LEGACY.items():
        key = key.replace(old, new)
    return key


def _here(owner: str, owners: Collection[str], model: nn.Module) -> str:
    """The module as this model calls it: with or without the base's prefix, as AdapterHub loads it."""
    modules, prefix = base_modules(model), f"{getattr(model, 'base_model_prefix', '')}."
    for added, removed in (("", ""), (prefix, ""), ("", prefix)):
        if all(anchor(added + each.removeprefix(removed)) in modules for each in owners):
            return added + owner.removeprefix(removed)
    missing = next((each for each in owners if anchor(each) not in modules), owner)
    raise AdapterError(f"the adapter acts in {missing}, and this model has no module {anchor(missing)}.")


def anchor(owner: str) -> str:
    """The module of the base in which AdapterHub put the owner, or the owner itself."""
    above, _, last = owner.rpartition(".")
    return above if last in ADDED else owner


def require_layers(owners: Iterable[str], sites: Iterable[Site], left_out: Any) -> None:
    """Every layer must have the tensors that its neighbours have: AdapterHub would start missing ones afresh.

    Args:
        sites: whose blocks are the layers, in order of execution; AdapterHub counts the encoder's first.
        left_out: numbers of layers that have none.
    """
    blocks = list(dict.fromkeys(site.block for site in sites if site.block and site.default))
    skipped = set(left_out or [])
    if not isinstance(left_out, list | None) or not all(type(number) is int for number in skipped):
        raise DamagedAdapter(f"{CONFIG} sets leave_out to {str(left_out)[:60]!r}, which is no list of layers.")
    inside: dict[str, set[str]] = {}
    for owner in owners:
        block = block_of(owner)
        if block not in blocks:
            raise AdapterError(f"the adapter acts in {owner}, which lies in no layer of this model.")
        inside.setdefault(block, set()).add(owner.removeprefix(block))
    for number, block in enumerate(blocks):
        stack = block.rpartition(".")[0]
        usual = set().union(*(held for other, held in inside.items() if other.rpartition(".")[0] == stack))
        here, expected = inside.get(block, set()), set() if number in skipped else usual
        if number not in skipped and not usual:
            raise DamagedAdapter(f"the file has no tensor in {stack}, and {CONFIG} does not leave its layers out.")
        for end in sorted(here ^ expected):
            what = "lacks the tensors of" if end in expected else "holds tensors of"
            raise DamagedAdapter(f"the file {what} {block}{end}, unlike what {CONFIG} says of layers.")


def refuse_options(own: Mapping[str, Any], neutral: Collection[str], known: Mapping[str, Any]) -> None:
    """Refuses what changes a function: options whose value is not the one of `known`, and options never heard of."""
    for option, value in own.items():
        if option in neutral or (option in known and value == known[option] and type(value) is type(known[option])):
            continue
        if option in known or value not in (None, False, 0, "", [], {}):
            raise AdapterError(f"{CONFIG} sets {option} to {str(value)[:60]!r}, which is not computed here.")


def flag(own: Mapping[str, Any], option: str, usual: bool | None = None) -> bool:
    """An option that is true or false; without a usual value it must be there."""
    value = own[option] if usual is None else own.get(option, usual)
    if not isinstance(value, bool):
        raise DamagedAdapter(f"{CONFIG} sets {option} to {str(value)[:60]!r}, which is neither true nor false.")
    return value


def number(value: Any, option: str) -> float:
    """The value of an option that is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DamagedAdapter(f"{CONFIG} sets {option} to {str(value)[:60]!r}, which is no finite number.")
    return float(value)


def parsed_version(version: Any) -> tuple[int, ...] | None:
    """The numbers of "adapters.1.3.0"; None of the predecessor's, which are plain ones, and where there is none."""
    match = re.fullmatch(r"adapters\.(\d+)\.(\d+)\.(\d+)", str(version))
    if match is None and str(version).startswith("adapters."):
        raise AdapterError(f"the folder was written by {str(version)[:60]!r}, no released version of AdapterHub's.")
    return tuple(map(int, match.groups())) if match else None
