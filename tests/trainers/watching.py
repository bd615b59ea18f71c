"""Looks on while a model trains: whether layers are computed again, and what the first forward was given."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.trainers.material import documents


class Watch:
    """Counts, from `start` on, how often layers run with gradients, and how often inside a backward pass."""

    def __init__(self) -> None:
        self.forget()
        self.layers = 0
        self.held = 0  # elements of all modules that the trainer holds, each tensor once

    def start(self, model: Any, holder: Any) -> None:
        """Begins to watch; `holder` is the trainer, if there is one."""
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.layers = len(layers)
        for layer in layers:
            inner = next(layer.children())  # runs inside what is checkpointed; the layer itself is what is called
            inner.register_forward_pre_hook(lambda module, args, layer=layer: self._seen(layer))
        model.register_forward_pre_hook(self._given, with_kwargs=True)
        if hasattr(holder, "add_callback"):
            holder.add_callback(_AtBegin(self))
        self._holder, self._model = holder, model

    def forget(self) -> None:
        """Counts anew."""
        self.forwards, self.recomputed = 0, 0
        self.flags: set[bool] = set()
        self.first: dict[str, torch.Tensor] | None = None

    def count(self) -> None:
        """Counts what the trainer holds, at the end: some make a reference late."""
        modules = [self._model, *(vars(self._holder).values() if self._holder is not None else ())]
        tensors = {id(p): p for module in modules if isinstance(module, torch.nn.Module) for p in module.parameters()}
        self.held = sum(map(elements, tensors.values()))

    def _seen(self, layer: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            self.recomputed += 1
        elif torch.is_grad_enabled():
            self.forwards += 1
            self.flags.add(bool(layer.gradient_checkpointing))

    def _given(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.first is None and module.training and torch.is_grad_enabled() and "input_ids" in kwargs:
            self.first = {key: value.clone() for key, value in kwargs.items() if torch.is_tensor(value)}

    def documents(self) -> list[dict[str, list[int]]]:
        """The documents that shared the first row, each with its labels."""
        assert self.first is not None
        ids, positions = self.first["input_ids"], self.first["position_ids"]
        assert ids.shape[0] == 1, "the rows were not packed"
        starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        known = {tuple(row["input_ids"]): row for row in documents()}
        return [known[tuple(ids[0, one:other].tolist())] for one, other in pairwise(starts)]


class _AtBegin(TrainerCallback):
    """What a trainer tries before it trains, such as a preflight, is not counted."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch.forget()


def elements(parameter: Any) -> int:
    """Elements of a parameter; of one in 4 bits, of what it stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())
