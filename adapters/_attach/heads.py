"""Heads that are trained whole: which modules they are, and the trained copies that answer in their places."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from adapters._attach.container import Container, Replica
from adapters._attach.state import FACES, STATE
from adapters._attach.swap import strip
from adapters._errors import AdapterError, nearest
from adapters._heads import base_model, output_embeddings


def chosen_heads(model: nn.Module, head: bool | Iterable[str] | None) -> tuple[str, ...]:
    """The modules that are trained whole: those named, or the task head, which lies outside the base model."""
    if head is False:
        return ()
    if head is not None and head is not True:
        named = (head,) if isinstance(head, str) else tuple(head)
        known = [path for path, module in model.named_modules() if path and any(True for _ in module.parameters())]
        for path in named:
            if path not in known:
                raise AdapterError(f"this model has no module {path!r} with parameters{nearest(path, known)}")
        return named
    base = base_model(model)
    outside = [
        path
        for path, child in model.named_children()
        if base is not None and child is not base and any(True for _ in child.parameters())
    ]
    if output_embeddings(model) is not None or not outside:
        if head is True:
            raise AdapterError("head=True, but this model has no task head outside its base model: name the modules.")
        return ()
    return tuple(outside)


def replica_of(model: nn.Module, path: str, given: Mapping[str, Tensor]) -> Replica:
    """A copy of a head with the adapter's tensors; linear layers may have another number of outputs than the base's."""
    replica = Replica(bare_copy(model.get_submodule(path)), path)
    own = dict(replica.named_parameters())
    if set(own) != set(given):
        raise AdapterError(f"the head {path} has parameters {sorted(own)}, the adapter has {sorted(given)}.")
    for key, parameter in own.items():
        owner = replica.get_submodule(key.rpartition(".")[0])
        outputs = type(owner) is nn.Linear and parameter.shape[1:] == given[key].shape[1:]
        if parameter.shape != given[key].shape and not outputs:
            raise AdapterError(f"the head {path} is {tuple(parameter.shape)} here and {tuple(given[key].shape)} there.")
        if outputs:
            owner.out_features = given[key].shape[0]  # type: ignore[assignment]
        parameter.data = given[key].detach().to(parameter.device).clone()
    return replica


def bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy of a base module without what is attached to it."""
    memo: dict[int, Any] = {id(each): None for each in module.modules() if isinstance(each, Container)}
    memo |= {id(each.__dict__[STATE]): None for each in module.modules() if STATE in each.__dict__}
    made = copy.deepcopy(module, memo)
    for each in made.modules():
        if FACES in each.__dict__:
            strip(each)
    return made
