"""Biases of the base that PEFT trained (bias="lora_only" or "all") as the adapter's own: b' = b + s e."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import CONFIG, PREFIX, head_paths
from adapters._interop.targets import base_modules


def take_biases(
    config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, adapted: Collection[str]
) -> dict[str, Tensor]:
    """Takes the base's biases out of a file's `tensors`: what was trained at each adapted module, `b' - b` in fp32.

    Raises:
        AdapterError: another bias than an adapted module's was trained, which no method here can hold.
        DamagedAdapter: the bias of an adapted module is missing; PEFT itself would keep the base's without a word.
    """
    if config.get("bias", "none") == "none":
        return {}
    modules, heads = base_modules(model), head_paths(config, model)
    trained: dict[str, Tensor] = {}
    biases = [key for key in tensors if key.endswith(".bias") and not key.endswith(".lora_B.bias")]
    for key in sorted(biases):
        owner = key.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
        if any(owner == head or owner.startswith(f"{head}.") for head in heads):
            continue
        stored = tensors.pop(key)
        base = _bias(modules.get(owner))
        if base is None or base.shape != stored.shape:
            raise AdapterError(f"the adapter trains the bias of {owner}, which has none of that size in this model.")
        if owner in adapted:
            trained[owner] = stored.float() - base.to(stored.device).float()
        elif not torch.equal(stored.to(base), base):
            raise AdapterError(
                f"{CONFIG} sets bias to {config['bias']!r}, and the file holds a trained bias of {owner}, which its "
                "LoRA does not adapt: train with bias='lora_only', or name that module in target_modules."
            )
    for owner in adapted:
        if owner not in trained and _bias(modules[owner]) is not None:
            raise DamagedAdapter(f"{CONFIG} sets bias to {config['bias']!r}, and the file lacks the bias of {owner}.")
    return trained


def _bias(module: nn.Module | None) -> Tensor | None:
    held = None if module is None else module._parameters.get("bias")
    return None if held is None else held.detach()
