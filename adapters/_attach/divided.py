"""Weights that other code reads, on models that are divided over processes.

FSDP2 asks for a parameter's attribute when it first runs, and must get the parameter; while its module runs the
parameter is whole. Under tensor parallelism it never is, and what stands in for it could not be computed.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from adapters._attach.container import CHILD
from adapters._attach.state import State, selection
from adapters._attach.swap import before_forward
from adapters._errors import AdapterError
from adapters._sharded import is_sharded


def refuse_divided_tables(
    model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Raises before a forward in which a weight that an adapter changes as it is read is split for good."""
    if "torch.distributed.tensor" not in sys.modules:
        return args, kwargs
    slots = tuple(f"{adapter.slot}-" for adapter in selection(state))
    for path, module in model.named_modules():
        held = module._modules.get(CHILD)
        if held is None or not any(key.startswith(slots) for key in held._modules):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter) and not _by_fsdp_alone(model, parameter):
                raise AdapterError(
                    f"{path}.{name} is split over processes by tensor parallelism, and an adapter changes it as it is "
                    "read: leave it out of targets= and tokens= out, or use FSDP2 or DDP."
                )
    return args, kwargs


def _by_fsdp_alone(model: nn.Module, parameter: Tensor) -> bool:
    from torch.distributed.fsdp import FSDPModule

    divided: Any = parameter
    splits = sum(placement.is_shard() for placement in divided.placements)
    return splits <= 1 and any(isinstance(module, FSDPModule) for module in model.modules())


before_forward.append(refuse_divided_tables)
