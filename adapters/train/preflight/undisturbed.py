"""Running a model as training would, and leaving no trace: not in its tensors, gradients, buffers, modes or the RNG."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach import state_of


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In training mode, without gradients and hooks on them that others left; everything comes back.

    Of the base nothing is copied but its buffers.
    """
    with _random_state(model), _gradients(model), _buffers(model), _modes(model), _engine(model):
        yield


@contextmanager
def shaken(tensors: Iterable[Tensor], noise: float, seed: int) -> Iterator[None]:
    """Adds to each tensor noise of its own, as large as `noise` times the tensor or, of zeros, `noise` itself."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for tensor, before in kept:
                scale = float(before.float().square().mean().sqrt()) or 1.0
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.add_((noise * scale * drawn).to(tensor))
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


@contextmanager
def _random_state(model: nn.Module) -> Iterator[None]:
    """Dropouts draw from torch's generators, and some models drop layers by Python's or numpy's."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    numpy: Any = sys.modules.get("numpy")
    python, drawn = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Puts every `.grad` aside, and the hooks that would let an optimizer step inside the backward."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    hooks = [(held, dict(held)) for p, _ in kept if (held := getattr(p, "_post_accumulate_grad_hooks", None))]
    for parameter, _ in kept:
        parameter.grad = None
    for held, _ in hooks:
        held.clear()
    try:
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad
        for held, before in hooks:
            held.update(before)


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in kept:
                module._buffers[name] = buffer
                buffer.copy_(before)


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    kept = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in kept:
            module.training = training


@contextmanager
def _engine(model: nn.Module) -> Iterator[None]:
    """A first forward may find that inputs must require gradients, and run twice; a training run must find the same."""
    state = state_of(model)
    before = state.inputs_require_grad if state is not None else False
    try:
        yield
    finally:
        if state is not None:
            state.inputs_require_grad = before
