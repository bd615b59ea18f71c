"""Runs a model without leaving a trace in it: flags, buffers, attributes and random states come back as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters._dispatch import wrapping_attention
from adapters._eightbit import in_eight_bits
from adapters._fourbit import read_as
from adapters._sites.rows import rows_of
from adapters._sites.trace import Tracer

# how attaching marks what it adds: the class a module had, and the children that hold adapters
OWN_CLASS, CONTAINER = "_adapter_base_class", "is_adapter_container"


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode and afterwards gives every module its attributes and buffers back, bit for bit."""
    # attributes hold the training flag, caches some models fill in forward, and instance-level forwards
    attributes = [(m, dict(vars(m))) for m in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    seed = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
            model.eval()
            yield
    finally:
        random.setstate(seed)
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer
            if buffer.device.type != "meta" and not torch.equal(buffer, content):
                with torch.no_grad():
                    buffer.copy_(content)


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Gives modules that adapters are attached to their own class back meanwhile, and hides the adapters."""
    swapped = [(m, m.__class__, dict(m._modules)) for m in list(model.modules())]
    try:
        for module, cls, children in swapped:
            module.__class__ = getattr(cls, OWN_CLASS, cls)
            for name, child in children.items():
                if getattr(child, CONTAINER, False) is True:
                    del module._modules[name]
        yield
    finally:
        for module, cls, children in swapped:
            module.__class__ = cls
            if module._modules.keys() != children.keys():
                module._modules.clear()
                module._modules.update(children)


@contextmanager
def stand_ins(tracer: Tracer) -> Iterator[None]:
    """Replaces the forward of modules with a quantised weight by one of the same shape that the tracer understands.

    Their own forward hides the weight from torch functions, and bitsandbytes' repacks it in place on some CPUs.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for path, module in tracer.modules.items():
            weight = getattr(module, "weight", None)
            if hasattr(weight, "quant_state") or in_eight_bits(weight):
                replaced.append((module, vars(module).get("forward")))
                vars(module)["forward"] = _stand_in(tracer, path, int(getattr(module, "out_features", 0)))
        with read_as(tracer.formed):
            yield
    finally:
        for module, forward in replaced:
            vars(module).pop("forward")
            if forward is not None:
                vars(module)["forward"] = forward


def _stand_in(tracer: Tracer, path: str, n_out: int) -> Callable[[Tensor], Tensor]:
    weight = f"{path}.weight" if path else "weight"

    def forward(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            columns = torch.arange(n_out, device=x.device) % x.shape[-1]
            out = x.index_select(-1, columns)  # some varying values of the right shape
        tracer.multiplied(path, weight, x, out)
        return out

    return forward


@contextmanager
def observed_attention(tracer: Tracer) -> Iterator[None]:
    """Lets the tracer see the attentions that go through transformers' interface, if transformers is in use."""
    if "transformers.modeling_utils" not in sys.modules:
        yield
        return
    with wrapping_attention(lambda attention, _: _observed(tracer, attention)):
        yield


def _observed(tracer: Tracer, attention: Callable[..., Any]) -> Callable[..., Any]:
    paths = {id(module): path for path, module in tracer.modules.items()}

    def observed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        operands = tracer.value(query), tracer.value(key), tracer.value(value)  # before the call: caches may grow
        tracer.inside_interface = True
        try:
            out = attention(module, query, key, value, *args, **kwargs)
        finally:
            tracer.inside_interface = False
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        path = paths.get(id(module), "")
        first = out[0] if isinstance(out, tuple) else out
        tracer.attended(path, bool(causal), operands, rows_of(key, tracer.rows), first)
        return out

    return observed
