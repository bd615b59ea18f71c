"""Parameters that code reads, such as fused experts, in 4 bits in place: reading one gives what stands for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from adapters._fourbit import is_quantized, stored_or_packed

BASE = "_adapters_unpacked_class"


@cache
def packed_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` that reads these parameters through `stored_or_packed`; its name stays."""
    space: dict[str, Any] = {
        BASE: base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": lambda self, protocol: (_restore, (base, names), self.__dict__),
        **{name: property(_reader(name)) for name in names},
    }
    made: type[nn.Module] = type(base.__name__, (base,), space)
    return made


def _reader(name: str) -> Any:
    return lambda self: stored_or_packed(self._parameters[name])


def _restore(base: Any, names: tuple[str, ...]) -> nn.Module:
    """Pickle finds classes by name; this one is made again."""
    cls = packed_class(base, names)
    return cls.__new__(cls)


def pack(module: nn.Module, name: str, device: torch.device | str | None) -> None:
    """Stores a parameter of `module` in nf4 with double quantisation."""
    from bitsandbytes.nn import Params4bit

    parameter = module._parameters[name]
    assert parameter is not None
    target = torch.device(device) if device is not None else parameter.device
    packed = Params4bit(parameter.data.contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    module._parameters[name] = packed.to(target)
    settle(module)


def settle(module: nn.Module) -> None:
    """Gives a module the class that its parameters need."""
    base: Any = getattr(type(module), BASE, type(module))
    names = tuple(sorted(key for key, held in module._parameters.items() if is_quantized(held)))
    module.__class__ = packed_class(base, names) if names else base
