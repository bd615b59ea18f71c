"""A model without memory: built from its configuration out of fake tensors, and adapted as real ones are."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adapters._attach import attach
from adapters._attach.state import state_of
from adapters._contract import Method
from adapters._eightbit import eightbit_modules
from adapters._errors import AdapterError
from adapters._fourbit import quantized_parameters
from adapters._hub.load import class_of, read_config
from adapters._plan.assumed import Assumed
from adapters._plan.ledger import Ledger
from adapters._plan.packed import packing_fakes, warm
from adapters._quantize import quantize


@dataclass(frozen=True)
class Blueprint:
    """What is needed to build a model without its weights.

    `dtypes` are those of a live model's parameters by path; `bits` is 4 for a base in 4 bits, 16 for any other.
    """

    name: str
    cls: Any
    config: Any
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    bits: int

    def in_bits(self, bits: int) -> Blueprint:
        return replace(self, bits=bits)


def blueprint(model: Any, dtype: torch.dtype | None, kind: str | None, bits: int | None) -> Blueprint:
    """Reads what `model` is: a live model, a configuration, or what `load_base` takes; no weight is read.

    Raises:
        AdapterError: there is no such model, or adapters are attached to it.
    """
    import transformers

    if isinstance(model, nn.Module):
        return _of_live(model, dtype, bits)
    config = model if isinstance(model, transformers.PretrainedConfig) else read_config(str(model))
    cls = class_of(config, kind)  # type: ignore[arg-type]
    own = getattr(config, "dtype", None)
    usual = torch.bfloat16 if bits == 4 else own if isinstance(own, torch.dtype) else torch.float32
    name = config.model_type if config is model else str(model)
    return Blueprint(name, cls, config, dtype or usual, {}, bits or 16)


def _of_live(model: nn.Module, dtype: torch.dtype | None, bits: int | None) -> Blueprint:
    if getattr(model, "config", None) is None:
        raise AdapterError(f"a {type(model).__name__} has no configuration that it could be built from a second time.")
    if state_of(model) is not None:
        raise AdapterError("adapters are attached to this model: detach them, or plan with the name of its base.")
    if any(True for _ in eightbit_modules(model)):
        raise AdapterError("a base in 8 bits cannot be planned: plan with the name of its base, in 16 bits or bits=4.")
    held = any(True for _ in quantized_parameters(model))
    dtypes = {path: p.dtype for path, p in model.named_parameters() if p.is_floating_point()}
    own = next(iter(dtypes.values()), torch.float32)
    kept = {} if dtype is not None else dtypes
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return Blueprint(name, type(model), model.config, dtype or own, kept, 4 if held else bits or 16)


@dataclass(frozen=True, eq=False)
class Hollow:
    """An adapted model of fake tensors, its optimizer, what counts their bytes, and what answers for their values."""

    model: Any
    optimizer: torch.optim.Optimizer
    ledger: Ledger
    assumed: Assumed


class _OneMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    def __deepcopy__(self, memo: Any) -> _OneMode:
        return self  # a copied module has its tensors in the mode of the original


@contextmanager
def hollow(plan: Blueprint, method: Method, options: Mapping[str, Any]) -> Iterator[Hollow]:
    """The adapted model after a first step, so that AdamW has its moments; tensors made inside are fake and counted.

    Args:
        options: of `attach`, beside the method.
    """
    four = plan.bits == 4 or method.quantize is not None
    with ExitStack() as stack:
        stack.enter_context(_unlogged())
        if four:
            with torch.device("meta"):
                shapes = _build(plan)
            warm(shapes)
            stack.enter_context(packing_fakes())
        # bitsandbytes' tables are real and shared by all that it quantises
        stack.enter_context(_OneMode(allow_non_fake_inputs=four))
        ledger, assumed = stack.enter_context(Ledger()), stack.enter_context(Assumed())
        model = _build(plan)
        if plan.bits == 4:
            quantize(model, "nf4")
        _attach(model, method, options, plan)
        optimizer = _stepped(model)
        gc.collect()
        ledger.claim((p.data for p in model.parameters() if p.requires_grad), "adapter")
        ledger.claim((t for state in optimizer.state.values() for t in state.values()), "moments")
        ledger.settle("base")
        yield Hollow(model, optimizer, ledger, assumed)


def _attach(model: nn.Module, method: Method, options: Mapping[str, Any], plan: Blueprint) -> None:
    try:
        attach(model, method, **options)
    except AdapterError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        raise AdapterError(
            f"a {type(model).__name__} in {plan.dtype} cannot be planned, since torch does not know the shape of one "
            f"of its results: {' '.join(str(error.__cause__).split())}"
        ) from error


@contextmanager
def _unlogged() -> Iterator[None]:
    """What fake tensors cannot do is raised, and not logged with a traceback as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _build(plan: Blueprint) -> nn.Module:
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(plan.dtype)
    try:
        with no_init_weights():  # some initialisers draw until a value fits
            model: nn.Module = plan.cls(copy.deepcopy(plan.config))
    except Exception as error:  # whatever a stranger's constructor may raise
        why = " ".join(str(error).split())[:200]
        raise AdapterError(f"a {plan.cls.__name__} cannot be built from its configuration alone: {why}") from error
    finally:
        torch.set_default_dtype(before)
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(plan.dtypes.get(path, plan.dtype))
    return model.eval()
