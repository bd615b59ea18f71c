"""Tensors that are spread over processes (DTensor, as FSDP2 makes them): read whole, written in their parts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from adapters._errors import AdapterError


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is sharded; then every process must call."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def put(tensor: Tensor, value: Tensor) -> None:
    """Copies all of a tensor's values into it, in place; each process keeps its part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        there: Any = tensor
        value = distribute_tensor(value.to(tensor.device, tensor.dtype), there.device_mesh, there.placements)
    tensor.copy_(value)


def require_gatherable(tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors of which a process holds a part only and that cannot be put together here.

    Raises:
        AdapterError: DeepSpeed ZeRO-3 has partitioned them.
    """
    for key, tensor in tensors.items():
        if hasattr(tensor, "ds_id") and tensor.numel() != getattr(tensor, "ds_numel", tensor.numel()):
            raise AdapterError(
                f"DeepSpeed ZeRO-3 has partitioned {key}: use FSDP2 or ZeRO-2, which leave adapters whole or gather "
                "them, or save inside deepspeed.zero.GatheredParameters."
            )


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor; where none was ever made, its module is not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes the files of these tensors: where they are sharded, the first one alone."""
    return not any(map(is_sharded, tensors)) or is_first_process()


def is_first_process() -> bool:
    """Whether this process is the one that writes, of those that share the work."""
    import torch.distributed as distributed

    return not distributed.is_available() or not distributed.is_initialized() or distributed.get_rank() == 0
