"""Attaching by a configuration: fresh, as a copy of an attached adapter, or from the folder it was read from."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from adapters._attach import activate, adapters_of, attach, install, set_trainable, state_of, tensors_of
from adapters._bridge.config import AdaptersConfig
from adapters._errors import AdapterError
from adapters._store import load


def attach_by(model: nn.Module, config: Any, name: str) -> None:
    """Attaches what a configuration asks for, as the active adapter that trains unless it is for inference."""
    own = _own(config)
    attach(
        model,
        own.method,
        name=name,
        targets=own.targets,
        head=own.head,
        tokens=own.tokens,
        tokenizer=own.tokenizer,
        example=own.example,
        sites=own.sites,
        dtype=own.dtype,
    )


def add(model: nn.Module, name: str, config: Any) -> None:
    """Adds an adapter that neither acts nor trains."""
    own, state = _own(config), state_of(model)
    assert state is not None, "only an attached model can be asked to add an adapter"
    source: Any = own.source
    if source is not None and source in adapters_of(model).values():
        tensors = {key: tensor.detach().clone() for key, tensor in tensors_of(model, source.name).items()}
        kept: dict[str, Any] = {key: getattr(source, key) for key in ("head", "facts", "labels", "tokens")}
        install(model, name, source.method, source.sites, tensors, activate=False, **kept)
        return
    active = [adapter.name for adapter in state.active]
    attach_by(model, config, name)
    set_trainable(model, name, False)
    activate(model, active[0] if active else None)


def join(model: nn.Module, config: Any, adapter_name: str = "default", **kwargs: Any) -> nn.Module:
    """What `get_peft_model` and `PeftModel.from_pretrained` call in place of a class of PEFT's.

    The latter then asks the result to load its folder: a configuration read from one attaches nothing until then.
    """
    if not _own(config).saved:
        attach_by(model, config, adapter_name)
        return model

    def load_adapter(model_id: str, name: str, is_trainable: bool = False, **ignored: Any) -> Any:
        del model.__dict__["load_adapter"]
        load(model, model_id, name, trainable=is_trainable)
        return _IncompatibleKeys([], [])

    model.__dict__["load_adapter"] = load_adapter
    return model


def _own(config: Any) -> AdaptersConfig:
    if not isinstance(config, AdaptersConfig):
        raise AdapterError(
            f"{type(config).__name__} is PEFT's own, and this model holds adapters of ours: give "
            "adapters.peft_config(...), or detach them first."
        )
    return config
