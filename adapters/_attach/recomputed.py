"""Activation checkpointing recomputes with the selection of the forward, whoever enables it and whenever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach.state import STATE, State, carrying, selection


def get_checkpointing(self: nn.Module) -> Callable[..., Any]:
    """The checkpoint function, carrying the selection into the recomputation."""
    state: State | None = self.__dict__.get(STATE)
    try:
        raw: Callable[..., Any] = self.__dict__["_gradient_checkpointing_func"]
    except KeyError:
        raise AttributeError("_gradient_checkpointing_func") from None
    if state is None:
        return raw

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if getattr(raw, "keywords", {}).get("use_reentrant"):
            args = _requiring_grad(args)
        return raw(carrying(function, state, selection(state)), *args, **kwargs)

    return checkpoint


def set_checkpointing(self: nn.Module, function: Callable[..., Any]) -> None:
    self.__dict__["_gradient_checkpointing_func"] = function


def _requiring_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reentrant checkpointing makes no gradients for a layer none of whose inputs requires one, as in a frozen base."""
    floating = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not floating or not torch.is_grad_enabled() or any(args[i].requires_grad for i in floating):
        return args
    first = floating[0]
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
