"""A model that a trainer holds, as what is saved of it: the adapters in it, and what no adapter holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from adapters._attach import base_parameters
from adapters._attach.state import state_of, unwrapped
from adapters._attach.swap import roots
from adapters._errors import AdapterError
from adapters._store import restore_attached, save_attached
from adapters._whole import write_whole

REST = "rest.safetensors"


def attached_parts(model: Any) -> dict[str, nn.Module]:
    """Every attached model that `model` is or holds, by its path; wrappers of torch's own are no part of it."""
    if not isinstance(model, nn.Module) or not roots:
        return {}
    named = unwrapped(model).named_modules()
    return {path: module for path, module in named if module in roots and state_of(module) is not None}


def save_parts(model: nn.Module, folder: str, write: bool = True) -> None:
    """Writes the adapters of each attached model, and the tensors outside them, if there are any."""
    found = attached_parts(model)
    for index, part in enumerate(found.values()):
        save_attached(part, _place(folder, index, found), write)
    if write:
        save_rest(model, folder)


def save_rest(model: nn.Module, folder: str) -> None:
    """Writes what a model holds outside the attached ones, such as a head of its own; nothing where it is one."""
    rest = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in _rest(model).items()}
    if rest:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(os.path.join(folder, REST), safetensors.torch.save(rest, {"format": "pt"}))


def restore_parts(model: nn.Module, folder: str) -> None:
    """Puts back what `save_parts`, or a trainer's own way of saving and `save_rest`, has written.

    Raises:
        AdapterError: adapters or other tensors are missing, or are not those of this model.
    """
    found, rest = attached_parts(model), _rest(model)
    path = os.path.join(folder, REST)
    if rest:
        if not os.path.isfile(path):
            raise AdapterError(f"{folder} lacks {REST}, with what this model holds outside the attached one.")
        saved = safetensors.torch.load_file(path)
        if {key: tensor.shape for key, tensor in saved.items()} != {key: t.shape for key, t in rest.items()}:
            raise AdapterError(f"{path} holds other tensors than this model has outside the attached one.")
    for index, part in enumerate(found.values()):
        restore_attached(part, _place(folder, index, found))
    for key, tensor in rest.items():
        tensor.detach().copy_(saved[key])


def require_frozen(model: nn.Module) -> None:
    """Refuses to train tensors of the base beside its adapters, which no adapter's file would hold.

    Raises:
        AdapterError: the sentence names the first.
    """
    for part in attached_parts(model).values():
        loose = [path for path, parameter in base_parameters(part).items() if parameter.requires_grad]
        if loose:
            raise AdapterError(
                f"{len(loose)} parameters of the base train beside the adapter, {loose[0]} among them, and no file of "
                "an adapter would hold them: name their modules in attach(head=[...]), or freeze them."
            )


def _place(folder: str, index: int, found: dict[str, nn.Module]) -> str:
    return folder if len(found) == 1 else os.path.join(folder, f"part-{index}")


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state that lie in none of the attached ones, under any of their names."""
    found = attached_parts(model)
    if "" in found:
        return {}
    inside = {id(tensor) for part in found.values() for tensor in (*part.parameters(), *part.buffers())}
    prefixes = tuple(f"{path}." for path in found)
    held = unwrapped(model).state_dict(keep_vars=True)
    return {
        key: tensor
        for key, tensor in held.items()
        if isinstance(tensor, Tensor) and id(tensor) not in inside and not key.startswith(prefixes)
    }
