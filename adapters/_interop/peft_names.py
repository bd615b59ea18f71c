"""What PEFT does to names as it loads a LoRA, by which tensors would end up elsewhere (PEFT 0.19 and later).

It takes a file for one that was written before transformers 5, and carries names over as transformers does in
checkpoints of the base (PEFT's transformers_weight_conversion.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from torch import nn

from adapters._contract import WeightSite
from adapters._interop.parameters import parameters_of
from adapters._interop.targets import base_modules

Step: TypeAlias = tuple[list[str], list[str]]  # patterns of old names, and of new ones
FUSED, UNFUSED = "gate_up_proj", ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def taken_otherwise(model: nn.Module, own: Mapping[str, Any], sites: Sequence[WeightSite]) -> str:
    """Why PEFT would not read at `sites` what is written for them, or nothing.

    Args:
        own: the configuration, whose `target_modules` name them.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    steps = _conversions(kind)
    return _for_experts(model, kind, steps, own["target_modules"]) or _renamed(steps, sites)


def _for_experts(model: nn.Module, kind: str, steps: Sequence[Step], targets: Sequence[str]) -> str:
    """Names that experts had before they were fused are taken for theirs, whatever else has such a name.

    So it is for types whose experts transformers fuses in the way of another type: shared experts, dense feed-forwards.
    """
    found = next((name for name in targets if name.rpartition(".")[2] in UNFUSED), None)
    if found is None or not _fused_like_another(kind, steps):
        return ""
    held = any(path.endswith(f".{FUSED}") for path in parameters_of(base_modules(model)))
    return f"PEFT takes {found!r} for the experts of this model, which it keeps under {FUSED}" if held else ""


def _fused_like_another(kind: str, steps: Sequence[Step]) -> bool:
    """Whether transformers loads the type's checkpoints by another type's conversion, and that fuses experts."""
    from transformers import conversion_mapping

    others = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {kind: ""})
    return kind in others and any(FUSED in target for _, targets in steps for target in targets)


def _renamed(steps: Sequence[Step], sites: Sequence[WeightSite]) -> str:
    """Some patterns for old names match names that are new already, as a dot in one matches every letter."""
    pairs = [(sources[0], targets[0]) for sources, targets in steps if len(sources) == len(targets) == 1]
    for site in sites:
        key = f"{site.owner}.lora_A.weight"
        if any(_changes(source, target, key) for source, target in pairs):
            return f"PEFT renames {site.owner} as it loads it, as transformers does in old checkpoints of this type"
    return ""


def _changes(source: str, target: str, key: str) -> bool:
    with suppress(re.error):  # of a pattern that is none of a name
        return re.sub(source, target, key) != key
    return False


def _conversions(kind: str) -> list[Step]:
    """How transformers changes the names in the type's checkpoints."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    steps = get_checkpoint_conversion_mapping(kind) or []
    return [(_words(step, "source_patterns"), _words(step, "target_patterns")) for step in steps]


def _words(step: Any, name: str) -> list[str]:
    return [str(each) for each in getattr(step, name, None) or ()]
