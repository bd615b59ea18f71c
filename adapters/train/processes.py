"""Several processes with one recipe, as `accelerate launch` and `torchrun` start them: the first prints and writes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from torch import nn

from adapters._attach import tensors_of
from adapters._sharded import is_sharded


def without_accelerator() -> bool:
    """Whether there are only CPUs, which accelerate must be told before it starts to share work among them."""
    return not torch.accelerator.is_available()


def _state() -> PartialState:
    return PartialState(cpu=without_accelerator())


def is_first() -> bool:
    return bool(_state().is_main_process)


def number() -> int:
    return int(_state().num_processes)


def wait() -> None:
    """Until every process is here."""
    _state().wait_for_everyone()


def anywhere(here: bool) -> bool:
    """Whether something holds in any process; all of them must ask."""
    return any(gather_object([here])) if number() > 1 else here


def agreed(path: Path | str | None) -> str | None:
    """What the first process says."""
    said: list[str | None] = [None if path is None else str(path)]
    if number() > 1:
        broadcast_object_list(said)
    return said[0]


def console_of(console: Console | None) -> Console:
    """The console of the first process; the others print nothing."""
    console = console or Console()
    return console if is_first() else Console(quiet=True)


def device() -> torch.device:
    """Where the base goes before training: where a sharded one goes, accelerate decides."""
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1", "yes")
    return torch.device("cpu") if sharded else _state().device


def sharded(model: nn.Module) -> bool:
    """Whether the adapter's tensors are divided among the processes, so that all must take part in reading them."""
    return any(is_sharded(tensor) for tensor in tensors_of(model, "default").values())
