"""What must be so before a model with adapters is spread over several devices."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapters._attach.state import state_of
from adapters._errors import AdapterError


def check(accelerator: Any, model: nn.Module) -> None:
    """Refuses what would train wrongly, or fail in its second step.

    Raises:
        AdapterError: an adapter trains and does not act, while DDP waits for every gradient; or FSDP1 would lay frozen
            and trained parameters into one flat tensor.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        if getattr(plugin, "fsdp_version", 1) == 1 and not plugin.use_orig_params:
            raise AdapterError(
                "FSDP1 lays a layer's parameters into one tensor, of which adapters would train only a part: set "
                "fsdp_use_orig_params: true, or use FSDP2 (fsdp_version: 2)."
            )
        return
    state = state_of(model)
    if state is None or accelerator.num_processes < 2:
        return
    idle = [each.name for each in state.adapters.values() if each.trainable and each not in state.active]
    if idle:
        raise AdapterError(
            f"{idle[0]!r} trains and does not act, so that its tensors would get no gradient, which DDP waits for: "
            "activate it, or load it with trainable=False."
        )
