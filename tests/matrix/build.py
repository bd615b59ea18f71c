"""A tiny random model of a pair, the same each time, with no weight at a neutral value."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from tests.matrix.batch import batch_for
from tests.matrix.pairs import Pair
from tests.matrix.shrink import config_for


@functools.cache
def _quiet() -> None:
    transformers.logging.set_verbosity(50)
    warnings.filterwarnings("ignore")


def build(pair: Pair) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode and fp32, and a batch for it.

    Norms, biases, layer scales and gates start at 0 or 1 in many architectures, where a mistake would not show, and an
    adapter behind a gate of 0 would have no effect: every parameter of one dimension, and every other that is constant,
    gets noise of its own.
    """
    _quiet()
    torch.manual_seed(0)
    made: Any = getattr(transformers, pair.cls)(config_for(pair))
    model = made.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or _constant(parameter):
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = batch_for(pair, model)
    _calibrate(model, batch)
    return model, batch


def _calibrate(model: nn.Module, batch: dict[str, Any]) -> None:
    """Gives batch norms the statistics of what reaches them: with 0 and 1 a random model's signal dies with depth."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        if norms:
            model(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        # a channel that hardly varies over so few pictures would have its rounding errors blown up
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))


def _constant(parameter: nn.Parameter) -> bool:
    return parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
