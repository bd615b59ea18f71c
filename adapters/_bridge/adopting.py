"""Takes over a live model of stock PEFT: its adapters become ours, on the base that it wraps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from adapters._attach import activate, adapters_of, detach
from adapters._errors import AdapterError
from adapters._store import load

Undo = Callable[[], None]


def adopt(peft_model: Any) -> nn.Module:
    """Turns a `peft.PeftModel` into its base with the same adapters attached here: one base, no copy of it.

    Names, tensors, what acts and what trains stay. `peft_model` itself is an empty shell afterwards; an optimizer over
    its parameters must be made anew.

    Args:
        peft_model: from `peft.get_peft_model` or `PeftModel.from_pretrained`, of any method that `load` reads.

    Returns:
        The base model, in place.

    Raises:
        AdapterError: it is no such model, or has a method or an option that is not known here; it is then unchanged.

    Example:
        >>> import adapters, peft
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> wrapped = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=160)),
        ...     peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        >>> model = adapters.adopt(wrapped)
        >>> type(model).__name__, list(adapters.adapters_of(model))
        ('LlamaForCausalLM', ['default'])
    """
    base, names = _base(peft_model), list(getattr(peft_model, "peft_config", ()))
    if base is None or not names:
        raise AdapterError(f"adopt takes a model of stock PEFT, found a {type(peft_model).__name__}.")
    trained = {name for name in names if _trains(peft_model, name)}
    active = _acting(peft_model, base)
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        undo = _unwrapped_layers(base)
        try:
            for name in names:
                place = folder if name == "default" else os.path.join(folder, name)
                load(base, place, name, trainable=name in trained, activate=False)
            activate(base, active)
        except BaseException:
            for name in list(adapters_of(base)):
                detach(base, name)
            undo()
            raise
    return base


def _base(peft_model: Any) -> nn.Module | None:
    if not isinstance(peft_model, nn.Module) or adapters_of(peft_model):
        return None
    getter = getattr(peft_model, "get_base_model", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _trains(peft_model: Any, name: str) -> bool:
    return any(p.requires_grad for key, p in peft_model.named_parameters() if name in key.split("."))


def _acting(peft_model: Any, base: nn.Module) -> str | None:
    """The adapter that acts, or None where PEFT has switched its layers off.

    Raises:
        AdapterError: what acts now is not what the files of the adapters say.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged_adapters for layer in layers):
        raise AdapterError("adapters are merged into this model: call unmerge_adapter() first.")
    off = {bool(layer.disable_adapters) for layer in layers}
    active = peft_model.active_adapters
    active = list(active() if callable(active) else active)
    if len(off) > 1 or len(active) != 1:
        raise AdapterError(
            f"one adapter may act in all layers when a model is adopted, found {active}: set_adapter(one)."
        )
    scaled = [layer for layer in layers if not _as_configured(layer)]
    if scaled:
        raise AdapterError("layers of this model were scaled after loading (scale_layer): unscale them first.")
    return None if off == {True} else str(active[0])


def _as_configured(layer: Any) -> bool:
    """Whether a LoRA layer's scaling is alpha / r or alpha / sqrt(r)."""
    alphas, ranks = getattr(layer, "lora_alpha", {}), getattr(layer, "r", {})
    return all(
        min(abs(scale - alphas[name] / ranks[name]), abs(scale - alphas[name] / ranks[name] ** 0.5)) < 1e-6 * abs(scale)
        for name, scale in getattr(layer, "scaling", {}).items()
        if name in alphas and ranks.get(name)
    )


def _unwrapped_layers(base: nn.Module) -> Undo:
    """Puts the layers that PEFT has wrapped back into their places; the result wraps them again."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped = []
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            parent, _, name = path.rpartition(".")
            wrapped.append((base.get_submodule(parent), name, module))
    for parent, name, module in wrapped:
        kept: Any = getattr(module, "original_module", None)
        setattr(parent, name, kept if isinstance(kept, nn.Module) else cast(Any, module).get_base_layer())

    def undo() -> None:
        for parent, name, module in wrapped:
            setattr(parent, name, module)

    return undo
