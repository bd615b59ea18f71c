"""Gradients through a frozen base: what the input embeddings return requires one where a model needs that.

Models that run their layers inside an autograd function of their own (reversible layers) train nothing below it unless
its input requires a gradient; and transformers makes the embeddings' output a leaf that requires one whenever
checkpointing is on, which models that add to it in place cannot take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adapters._attach.state import STATE, State, selection


def input_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that turn a batch into the first hidden states, of the model and of the models inside it."""
    seen: set[int] = set()
    for module in model.modules():
        getter: Any = getattr(module, "get_input_embeddings", None)
        try:
            found = getter() if callable(getter) else None
        except (NotImplementedError, AttributeError):  # how models say that they have none
            found = None
        if isinstance(found, nn.Module) and id(found) not in seen:
            seen.add(id(found))
            yield found


def input_call(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The call of input embeddings: their output requires a gradient where the State says so, and never is a leaf."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        y = inner(self, *args, **kwargs)
        state: State | None = self.__dict__.get(STATE)
        if state is None or not isinstance(y, Tensor) or not torch.is_grad_enabled() or not y.is_leaf:
            return y
        if (
            state.inputs_require_grad
            and y.is_floating_point()
            and any(adapter.trainable for adapter in selection(state))
        ):
            y.requires_grad_()
        return y.clone() if y.requires_grad else y

    return __call__


def is_cut_off(result: Any) -> bool:
    """Whether a result, made with gradients on, has floating-point tensors none of which requires a gradient."""
    values = list(result.values()) if isinstance(result, Mapping) else result  # a sparse tensor has values, too
    floats = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    return bool(floats) and not any(x.requires_grad for x in floats)
