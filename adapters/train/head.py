"""Cross-entropy from hidden states, a few positions at a time, through the model's own output layer.

The logits of all labelled tokens would be the largest tensors of a step: 164 MB for 837 tokens and 49,152 words, and
three times that with their softmax and gradients. So the model runs up to its hidden states, and its own forward is
then called for some of them at a time, with the layers below answering what they answered before: whatever it does
there (a bias, a scale, a soft cap) is done. With p = softmax(z) of the logits z, over labelled positions with label c,

    total = sum -log p_c;   d total / d z = p - 1_c;   entropy = sum_c -p_c log p_c

are taken in one pass, and the gradient of the hidden states at once, so that no logits are kept for backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from adapters._attach.state import unwrapped
from adapters._sharded import is_sharded

LOGITS = 2**24  # at most this many at once: 64 MiB in fp32
_LEAST = -1e4  # exp(-1e4) is 0 and 0 * -1e4 too, where a model gives a word no chance (-inf)


@dataclass(frozen=True, eq=False)
class Sums:
    """Over labelled positions."""

    total: Tensor  # cross-entropy, nats
    correct: Tensor  # of those whose label is the most likely
    entropy: Tensor  # of the predictions, nats


def can_stop_early(model: Any) -> bool:
    """Whether the hidden states can be had apart from the logits: a model in one piece, or under DDP."""
    root: Any = unwrapped(model)
    whole = model is root or isinstance(model, DistributedDataParallel)
    has_layers = root._modules.get(getattr(root, "base_model_prefix", "")) is not None
    return whole and has_layers and not any(is_sharded(p) for p in root.parameters())


def up_to_head(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What the model returns with the logits of one position, and what the layers below its head return."""
    seen: list[Any] = []
    root: Any = unwrapped(model)
    handle = root._modules[root.base_model_prefix].register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        outputs = model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    return outputs, seen[-1]


def head_sums(model: Any, inputs: Mapping[str, Any], below: Any, hidden: Tensor, labels: Tensor) -> Sums:
    """The sums over positions with hidden states (positions, width) and labels (positions,).

    Args:
        inputs: those of the forward that `below` comes from.
        below: what the layers below the head returned.
    """

    def logits_of(some: Tensor) -> Tensor:
        with _answering(root, type(below)(**{**below, "last_hidden_state": some[None]})):
            found: Tensor = root.forward(**inputs).logits.squeeze(0)
            return found  # past the hooks on the model, which a step calls once

    root: Any = unwrapped(model)
    rows = max(1, LOGITS // int(root.config.get_text_config().vocab_size))
    # more of the logits than these states is trained: the head itself, or another path from the layers to it
    trains_head = torch.is_grad_enabled() and logits_of(hidden[:1].detach()).requires_grad
    learns = trains_head or (torch.is_grad_enabled() and hidden.requires_grad)
    kept = hidden if trains_head else hidden.detach()
    parts, gradients = [], []
    for some, wanted in zip(torch.split(kept, rows), torch.split(labels, rows), strict=True):
        some = some if trains_head else some.requires_grad_(learns)
        logits = logits_of(some)
        total, correct, entropy, slope = _chunk(logits.detach(), wanted.to(logits.device), learns)
        if slope is not None and trains_head:
            total = _attached(logits, total, slope)
        elif slope is not None:
            gradients.append(torch.autograd.grad(logits, some, slope)[0])
        parts.append((total, correct, entropy))
    total, correct, entropy = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    if gradients:
        total = _attached(hidden, total, torch.cat(gradients))
    return Sums(total, correct, entropy)


def _chunk(logits: Tensor, labels: Tensor, slope: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Total, correct, entropy and, where asked for, p - 1_c in the dtype of the logits (positions, words)."""
    z = logits.float()
    best, at = z.max(-1, keepdim=True)
    z = torch.sub(z, best).clamp_(min=_LEAST)
    of_label = z.gather(1, labels[:, None])
    p = torch.exp(z)
    size = p.sum(-1, keepdim=True)
    p.div_(size)
    entropy = size.log().sum() - torch.dot(p.view(-1), z.view(-1))  # -sum p log p, with log p = z - log size
    total = (size.log() - of_label).sum()
    correct = (at[:, 0] == labels).sum()
    if not slope:
        return total, correct, entropy, None
    p.scatter_add_(1, labels[:, None], torch.full_like(of_label, -1))
    return total, correct, entropy, p.to(logits.dtype)


class _Attached(torch.autograd.Function):
    """A number whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return number.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient), None, None  # the head may be on another device than the layers


def _attached(x: Tensor, number: Tensor, gradient: Tensor) -> Tensor:
    found: Tensor = _Attached.apply(x, number, gradient)  # type: ignore[no-untyped-call]
    return found


class _Answer(nn.Module):
    """Stands where the layers below the head do, and returns what they returned."""

    def __init__(self, inner: nn.Module, answer: Any) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["answer"] = inner, answer  # past nn.Module: no child of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"]

    def __getattr__(self, name: str) -> Any:  # what else the model reads there
        return getattr(self.__dict__["inner"], name)


@contextmanager
def _answering(root: Any, answer: Any) -> Iterator[None]:
    """The layers below the head of `root` return `answer` inside the block, whatever they are given."""
    name = root.base_model_prefix
    inner = root._modules[name]
    root._modules[name] = _Answer(inner, answer)
    try:
        yield
    finally:
        root._modules[name] = inner
