"""What a `PeftModel` can be asked, answered by an attached model (the members of PEFT 0.21's `peft_model.py`).

Mixed into the root's class by `mapping.connect`, ahead of the base's own class: methods here may hide those that
transformers gives every model under the same names. Nothing falls through to PEFT's own code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from adapters._attach import activate as make_active
from adapters._attach import adapters_of, detach, set_trainable, state_of, tensors_of, using
from adapters._attach.swap import base_class
from adapters._bridge import status
from adapters._bridge.config import TYPE, AdaptersConfig, config_of
from adapters._bridge.joining import add
from adapters._errors import AdapterError
from adapters._fourbit import elements
from adapters._merge import merge
from adapters._selection import Stack, expanded, names_in
from adapters._store import load, restore, save, save_attached


class Configs(dict[str, AdaptersConfig]):
    """The configurations by adapter. Trainers ask for `default`: it also means the one adapter that trains."""

    def __missing__(self, name: str) -> AdaptersConfig:
        trained = [config for config in self.values() if config.source.trainable]
        if name == "default" and len(trained) == 1:
            return trained[0]
        raise KeyError(name)


class PeftFace:
    """The members of `PeftModel`; `self` is the root of an attached model."""

    peft_type = TYPE
    special_peft_forward_args: frozenset[str] = frozenset()
    _is_prompt_learning = False

    @property
    def peft_config(self) -> Configs:
        """The configuration of every attached adapter, made anew: changing one changes nothing."""
        return Configs(
            {
                name: config_of(adapter, next(iter(tensors_of(_module(self), name).values())).dtype)
                for name, adapter in adapters_of(_module(self)).items()
            }
        )

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        state = state_of(_module(self))
        return [adapter.name for adapter in state.active] if state is not None else []

    @property
    def active_adapter(self) -> str:
        """The adapter that acts or, while none does, the one that trains."""
        found = adapters_of(_module(self)).values()
        trained = [adapter.name for adapter in found if adapter.trainable]
        return next(iter([*self.active_adapters, *trained, *adapters_of(_module(self))]))

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts."""
        return bool(self.active_adapters)

    @property
    def active_peft_config(self) -> AdaptersConfig:
        """The configuration of `active_adapter`."""
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """The heads that are trained whole."""
        return {path for adapter in adapters_of(_module(self)).values() for path in adapter.head} or None

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self, "dtype", None)

    @property
    def model(self) -> Any:
        """Of a model that is its own `base_model`: itself, as `base_model.model` means the root."""
        modules, prefix = _module(self)._modules, getattr(self, "base_model_prefix", "")
        if "model" not in modules and (prefix == "model" or prefix in modules):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'model'")
        return modules.get("model", self)

    def get_base_model(self) -> Any:
        """The model itself: attaching wraps nothing."""
        return self

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> Any:
        return base_class(_module(self))

    def disable_adapter(self) -> Any:
        """A context in which the base acts alone, exactly."""
        return using(_module(self), None)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes one adapter act and, as PEFT does, train, and freezes the others; `adapters.activate` only switches."""
        make_active(_module(self), adapter_name)
        for name in adapters_of(_module(self)):
            set_trainable(_module(self), name, name == adapter_name and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Lets adapters train, or freezes them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            set_trainable(_module(self), name, requires_grad)

    def add_adapter(self, adapter_name: Any = "default", peft_config: Any = None, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter that neither acts nor trains.

        By a configuration read from an attached adapter a copy of it is added, tensors included: trainers make their
        reference so, and then copy tensors by PEFT's names, which there are none of here.
        """
        if not isinstance(adapter_name, str):  # transformers' own method takes the configuration first
            adapter_name, peft_config = peft_config or "default", adapter_name
        add(_module(self), adapter_name, peft_config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Detaches an adapter; without any, the model is no PeftModel any more."""
        detach(_module(self), adapter_name)

    def load_adapter(
        self, model_id: str, adapter_name: str = "default", is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a folder under a new name, inactive, or into the tensors of an attached adapter of that name."""
        if adapter_name in adapters_of(_module(self)):
            restore(_module(self), adapter_name, model_id)
        else:
            load(_module(self), model_id, adapter_name, trainable=is_trainable, activate=False)
        if not is_trainable:
            _module(self).eval()  # as PEFT does
        return _IncompatibleKeys([], [])  # loading is strict: whatever is missing was refused

    @classmethod
    def from_pretrained(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's when it is given a model, else that of the base's own class."""
        if not isinstance(model, nn.Module):
            return base_class(cls.__new__(cls)).from_pretrained(model, *args, **kwargs)  # type: ignore[arg-type]
        from peft import PeftModel

        return PeftModel.from_pretrained(model, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str, safe_serialization: bool = True, selected_adapters: Any = None, **kwargs: Any
    ) -> None:
        """Writes adapters only: `default`, or the first, into the folder, the others into folders in it."""
        if not safe_serialization:
            raise AdapterError("adapters are saved as safetensors only: leave safe_serialization=True.")
        write = bool(kwargs.get("is_main_process", True))
        if selected_adapters is None:
            save_attached(_module(self), save_directory, write)
        for name in selected_adapters or () if write else ():
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            save(_module(self), name, folder)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merges what is active, or the adapters of these names, and returns the model.

        Measured as `adapters.merge` does; what is not merged is detached.
        """
        names = [self.active_adapter] if adapter_names is None else list(adapter_names)
        selection = names[0] if len(names) == 1 else Stack(*names)
        state, attached = state_of(_module(self)), adapters_of(_module(self))
        kept = set(names_in(expanded(selection, state.named if state is not None else {})))
        if kept <= attached.keys():  # or merge says which is missing, and nothing was detached
            for other in [name for name in attached if name not in kept]:
                detach(_module(self), other)
        merge(_module(self), selection)
        return self

    def unload(self) -> Any:
        """Detaches every adapter and returns the base."""
        detach(_module(self))
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; a weight in 4 bits counts as what it stands for."""
        counts = [(parameter.requires_grad, elements(parameter)) for parameter in _module(self).parameters()]
        return sum(count for trained, count in counts if trained), sum(count for _, count in counts)

    def print_trainable_parameters(self) -> None:
        """Prints what `get_nb_trainable_parameters` counts."""
        trained, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Nothing to prepare: an attached model sees to the gradients of its inputs itself."""
        return model

    _prepare_model_for_gradient_checkpointing = prepare_model_for_gradient_checkpointing

    def get_layer_status(self) -> list[Any]:
        """PEFT's record of every adapted place."""
        return status.layers(_module(self))

    def get_model_status(self) -> Any:
        """PEFT's record of the whole."""
        return status.whole(_module(self))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """`save_pretrained` writes the card; one that is there already stays as it is."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's change is a product of two thin matrices at every site."""
        adapter = self.peft_config[adapter_name].source
        keys = {key.rpartition(":")[2] for key in tensors_of(_module(self), adapter.name)}
        return bool(getattr(adapter.method, "rank", 0)) and adapter.method.kind == "weight" and {"a", "b"} == keys

    def _get_peft_specific_model_tags(self) -> list[str]:
        return ["transformers", *sorted({adapter.method.name for adapter in adapters_of(_module(self)).values()})]

    def _check_new_adapter_config(self, peft_config: Any, is_trainable: bool) -> None:
        """Any two of our methods can be attached side by side."""


def _refused(name: str, instead: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AdapterError(f"PeftModel.{name} has no meaning for an attached model: {instead}.")

    refuse.__name__, refuse.__doc__ = name, f"Refused: {instead}."
    return refuse


_PROMPT = "a prefix acts inside the attentions and has no prompt encoder"
_FORWARD = "adapters act by themselves in every forward; choose with adapters.using"
REFUSED = {
    "get_prompt": _PROMPT,
    "get_prompt_embedding_to_save": _PROMPT,
    "_setup_prompt_encoder": _PROMPT,
    "_adjust_prompt_learning_kwargs": _PROMPT,
    "_enable_peft_forward_hooks": _FORWARD,
    "_update_offload": "adapters are loaded before the model is offloaded",
    "_split_kwargs": "folders are read by adapters.load",
    "merge_adapter": "a merge is measured and final; use adapters.merge, or keep the adapter attached",
    "unmerge_adapter": "a merge is final; keep the adapter attached instead",
    "disable_adapters": "use disable_adapter(), or adapters.activate(model, None)",
    "enable_adapters": "use set_adapter(name), or adapters.activate(model, name)",
    "get_adapter_state_dict": "adapters.save writes an adapter's tensors",
    "add_weighted_adapter": "adapters are combined as files or selections, not inside PEFT",
}
for _name, _instead in REFUSED.items():
    setattr(PeftFace, _name, _refused(_name, _instead))


def _module(face: PeftFace) -> nn.Module:
    assert isinstance(face, nn.Module)
    return face
