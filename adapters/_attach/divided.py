"""Weights that other code reads, on models that are divided over processes.

FSDP2 asks for a parameter's attribute when it first runs, and must get the parameter; while its module runs the
parameter is whole. Under tensor parallelism it never is, and what stands in for it could not be computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from adapters._attach.entries import submodule
from adapters._attach.state import ENTER, FACES, Adapter, State, selection
from adapters._attach.swap import before_forward
from adapters._contract import WeightSite
from adapters._errors import AdapterError
from adapters._sharded import is_sharded


def refuse_divided_tables(
    model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Raises before a forward in which a weight that an adapter changes as it is read is split for good."""
    if "torch.distributed.tensor" not in sys.modules:
        return args, kwargs
    below = "" if ENTER in model.__dict__[FACES] else state.base_path  # what is called may be a part of the root
    for path in (path for adapter in selection(state) for path in _read(adapter) if path.startswith(below)):
        owner, _, name = path.removeprefix(below).rpartition(".")
        parameter = submodule(model, owner)._parameters[name]
        if parameter is not None and is_sharded(parameter) and not _by_fsdp_alone(model, parameter):
            raise AdapterError(
                f"{path} is split over processes by tensor parallelism, and an adapter changes it as it is read: leave "
                "it out of targets= and tokens=, or use FSDP2 or DDP."
            )
    return args, kwargs


def _read(adapter: Adapter) -> Iterator[str]:
    """The weights that an adapter changes as they are read."""
    yield from (site.path for site in adapter.sites if isinstance(site, WeightSite) and site.access == "read")
    yield from adapter.tokens.tables if adapter.tokens is not None else ()


def _by_fsdp_alone(model: nn.Module, parameter: Tensor) -> bool:
    from torch.distributed.fsdp import FSDPModule

    divided: Any = parameter
    splits = sum(placement.is_shard() for placement in divided.placements)
    return splits <= 1 and any(isinstance(module, FSDPModule) for module in model.modules())


before_forward.append(refuse_divided_tables)
