"""Reads an adapter that AdapterHub's library wrote: bottlenecks, LoRA and IA3, each proven to be the same function.

AdapterHub's distribution is called `adapters`, as this package is. What its 1.3.0 writes is read, and what earlier
versions wrote as 1.3.0 loads it (github.com/adapter-hub/adapters: src/adapters/loading.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import CONFIG
from adapters._interop.hub_bottleneck import read_bottleneck
from adapters._interop.hub_folder import FromHub, HubFiles
from adapters._interop.hub_head import read_head
from adapters._interop.hub_lora import read_lora
from adapters._interop.targets import base_modules
from adapters._sites import SiteMap

OTHERS = {
    "mtl_lora": "multi-task LoRA",
    "prefix_tuning": "prefix tuning",
    "prompt_tuning": "prompt tuning",
    "reft": "ReFT",
    "union": "union of several methods",
}


def understand(files: HubFiles, model: nn.Module, sites: SiteMap) -> FromHub:
    """An adapter of AdapterHub's in our words, every tensor accounted for.

    Raises:
        AdapterError: it computes something that no method here does, by name, or this model has not its modules.
        DamagedAdapter: tensors are missing or superfluous.
    """
    own = files.config.get("config")
    if not isinstance(own, Mapping):
        raise DamagedAdapter(f"{CONFIG} holds no options of an adapter.")
    try:
        _require_type(files, model)
        _require_same_base(files, model, sites)
        found = _adapter(files, own, model, sites)
        return found if files.head_config is None else _with_head(found, files, model)
    except AdapterError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise DamagedAdapter(f"{CONFIG} lacks a field or holds one of another type: {str(error)[:80]}.") from error


def kind_of(own: Mapping[str, Any]) -> str:
    """What AdapterHub calls the method, in a word: "bottleneck", "lora", "ia3", or its `architecture`."""
    kind = own.get("architecture") or "bottleneck"
    return "ia3" if kind == "lora" and own.get("composition_mode") == "scale" else str(kind)[:60]


def _adapter(files: HubFiles, own: Mapping[str, Any], model: nn.Module, sites: SiteMap) -> FromHub:
    kind = own.get("architecture")
    if kind == "lora":
        return read_lora(own, files, model, sites)
    if kind is not None:
        what = OTHERS.get(str(kind), repr(str(kind)[:60]))
        raise AdapterError(f"the folder holds AdapterHub's {what}, and only bottlenecks, LoRA and IA3 can be read.")
    return read_bottleneck(own, files, model)


def _require_type(files: HubFiles, model: nn.Module) -> None:
    """AdapterHub's ports hand their layers other tensors: one type's adapter is another function elsewhere."""
    made, here = str(files.config["model_type"]), getattr(getattr(model, "config", None), "model_type", None)
    if made != here:
        raise AdapterError(f"the adapter was made for a model of type {made[:60]!r}, and this one is {here!r}.")


def _require_same_base(files: HubFiles, model: nn.Module, sites: SiteMap) -> None:
    """AdapterHub changes some bases as it takes them over, and the adapter was trained on what came of it (1.3.0).

    A base's own adapters (X-MOD's, `adapter_modules`) are off there, unless they are asked for. A fused projection
    without a bias is replaced by one with a bias, which is drawn at random and never saved.
    """
    for path in base_modules(model):
        if path.rpartition(".")[2] == "adapter_modules":
            raise AdapterError(f"AdapterHub turns the base's own {path} off, and here they are part of it.")
    if files.interface is not None and "lora" not in (files.interface.get("adapter_methods") or ("lora",)):
        return
    for site in sites.weights:
        if site.role == "attention.qkv" and model.get_submodule(site.owner)._parameters.get("bias") is None:
            raise AdapterError(
                f"AdapterHub gives {site.owner} a bias, which the model has not, at random and does not save it: what "
                "the adapter was trained on is lost."
            )


def _with_head(found: FromHub, files: HubFiles, model: nn.Module) -> FromHub:
    tensors, head, labels, note = read_head(files.head_config or {}, files.head, model)
    notes = (*found.notes, note) if note else found.notes
    return replace(found, tensors=found.tensors | tensors, head=head, labels=labels, notes=notes)
