"""A fine-tuned model beside its base: its weights by the base's paths, and which of them moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters._algebra.reports import LeftOut
from adapters._algebra.thin import wide
from adapters._attach import adapters_of, base_parameters, base_weight, unwrapped
from adapters._attach.swap import base_class
from adapters._contract import WeightSite
from adapters._eightbit import eightbit_modules
from adapters._errors import AdapterError, nearest
from adapters._fourbit import dequantize, is_quantized


@dataclass(frozen=True)
class Tuned:
    """The tensors of a fine-tuned model, and of the base that it came from, by path; `model` where it is one."""

    tensors: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    model: nn.Module | None = None

    @classmethod
    def of(cls, base: nn.Module, tuned: nn.Module | Mapping[str, Tensor]) -> Tuned:
        """Raises AdapterError where the two cannot be the same model before and after training."""
        held: dict[str, Tensor] = dict(base_parameters(base))
        for each in (base, tuned):
            if isinstance(each, nn.Module) and any(True for _ in eightbit_modules(each)):
                raise AdapterError(
                    "weights in 8 bits cannot be told from their fine-tuned ones: load base and model in 16 bits."
                )
        if not isinstance(tuned, nn.Module):
            if not isinstance(tuned, Mapping):
                raise AdapterError(f"tuned is a {type(tuned).__name__}; give the fine-tuned model or its state dict.")
            return cls(tuned, held)
        tuned = unwrapped(tuned)
        if adapters_of(tuned):
            raise AdapterError("adapters are attached to the fine-tuned model: merge them first, or combine them.")
        here, there = base_class(base).__name__, base_class(tuned).__name__
        if here != there:
            raise AdapterError(f"the fine-tuned model is a {there}, and the base a {here}: they must be of one class.")
        return cls(dict(tuned.named_parameters(remove_duplicate=False)), held, tuned)

    def tensor(self, path: str) -> Tensor:
        """A tensor of the fine-tuned model as it is stored, in fp64."""
        if path not in self.tensors:
            raise AdapterError(f"the fine-tuned model has no {path}{nearest(path, self.tensors)}")
        return _dense(self.tensors[path])

    def weight(self, site: WeightSite) -> Tensor:
        """A weight of the fine-tuned model as methods see it, in fp64."""
        if self.model is not None and site.path in self.tensors:
            found = wide(base_weight(self.model, site).dense())
        else:
            path = next((path for path in (site.path, *site.aliases) if path in self.tensors), site.path)
            stored = self.tensor(path)
            matrix = stored.flatten(1) if site.folded else stored
            found = matrix.mT if site.transposed else matrix
        if tuple(found.shape) != site.shape:
            raise AdapterError(f"{site.path} is {tuple(found.shape)} in the fine-tuned model and {site.shape} here.")
        return found

    def apart(self, path: str) -> bool:
        """Whether a parameter differs from the base's."""
        return path in self.base and not _equal(self.tensor(path), _dense(self.base[path]))


def moved_elsewhere(model: nn.Module, tuned: Tuned, covered: set[str]) -> tuple[tuple[LeftOut, ...], tuple[str, ...]]:
    """The parameters that moved and are not `covered`, and what could not be compared."""
    names = _names(model)
    found, missing = [], []
    for path, parameter in tuned.base.items():
        paths = names(parameter)
        if covered & paths:
            continue
        there = next((name for name in (path, *sorted(paths)) if name in tuned.tensors), None)
        if there is None:
            missing.append(path)
            continue
        old, new = _dense(parameter), tuned.tensor(there)
        if old.shape != new.shape:
            found.append(LeftOut(path, math.nan, math.nan))
        elif not _equal(new, old):
            moved, size = float((new.to(old.device) - old).norm()), float(old.norm())
            found.append(LeftOut(path, moved, moved / size if size else math.inf))
    reshaped = [left.path for left in found if math.isnan(left.moved)]
    notes = [f"{len(missing)} parameters are not in the state dict, such as {missing[0]}"] if missing else []
    notes += [f"{len(reshaped)} parameters have another shape there, such as {reshaped[0]}"] if reshaped else []
    return tuple(found), tuple(notes)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.device), b)


def _names(model: nn.Module) -> Callable[[Tensor], set[str]]:
    """Every path of a parameter: tied ones have several."""
    held: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), set()).add(path)
    return lambda parameter: held.get(id(parameter), set())


def _dense(stored: Tensor) -> Tensor:
    found = dequantize(stored) if isinstance(stored, nn.Parameter) and is_quantized(stored) else stored
    return wide(found)
