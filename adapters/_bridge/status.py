"""PEFT's records of what is attached where (`TunerLayerStatus`, `TunerModelStatus`), filled in from our own."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapters._attach import Adapter, adapters_of, state_of
from adapters._attach.entries import entry_of
from adapters._attach.state import selection
from adapters._attach.swap import base_class
from adapters._bridge.config import TYPE
from adapters._eightbit import eightbit_modules
from adapters._fourbit import elements, quantized_parameters


def layers(model: nn.Module) -> list[Any]:
    """One record for every site at which any adapter acts."""
    from peft.peft_model import TunerLayerStatus

    where: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters_of(model).items():
        for site in adapter.sites:
            where.setdefault(site.path, {})[name] = adapter
    active, backend = _active(model), _backend(model)
    made = []
    for path, here in where.items():
        parameters = {name: _parameters(model, adapter, path) for name, adapter in here.items()}
        made.append(
            TunerLayerStatus(
                name=path,
                module_type=", ".join(sorted({adapter.method.name for adapter in here.values()})),
                enabled=bool(active),
                active_adapters=[name for name in active if name in here],
                merged_adapters=[],
                requires_grad={name: all(p.requires_grad for p in given) for name, given in parameters.items()},
                available_adapters=sorted(here),
                devices={name: sorted({p.device.type for p in given}) for name, given in parameters.items()},
                quantization_backend=backend,
            )
        )
    return made


def whole(model: nn.Module) -> Any:
    """One record for the model."""
    from peft.peft_model import TunerModelStatus

    found, every = adapters_of(model), list(model.parameters())
    sites = [(name, site.path, adapter) for name, adapter in found.items() for site in adapter.sites]
    return TunerModelStatus(
        base_model_type=base_class(model).__name__,
        adapter_model_type="adapters",
        peft_types={name: str(TYPE) for name in found},
        trainable_params=sum(elements(p) for p in every if p.requires_grad),
        total_params=sum(map(elements, every)),
        num_adapter_layers=len({path for _, path, _ in sites}),
        enabled=bool(_active(model)),
        active_adapters=_active(model),
        merged_adapters=[],
        requires_grad={name: adapter.trainable for name, adapter in found.items()},
        available_adapters=sorted(found),
        devices={name: _devices(model, adapter) for name, adapter in found.items()},
        quantization_backend=_backend(model),
    )


def _active(model: nn.Module) -> list[str]:
    state = state_of(model)
    return [adapter.name for adapter in selection(state)] if state is not None else []


def _backend(model: nn.Module) -> str | None:
    if any(True for _ in eightbit_modules(model)):
        return "bnb 8bit"
    return "bnb 4bit" if any(True for _ in quantized_parameters(model)) else None


def _parameters(model: nn.Module, adapter: Adapter, path: str) -> list[nn.Parameter]:
    site = next(site for site in adapter.sites if site.path == path)
    return [parameter for parameter in entry_of(model, adapter, site)._parameters.values() if parameter is not None]


def _devices(model: nn.Module, adapter: Adapter) -> list[str]:
    return sorted({p.device.type for site in adapter.sites for p in _parameters(model, adapter, site.path)})
