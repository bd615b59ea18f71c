"""LoRA, DoRA, IA3 and prefixes as the files that stock PEFT reads, LoRA also vLLM and mistral.rs (PEFT 0.21)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from adapters._attach import state_of
from adapters._attach.swap import base_class
from adapters._contract import KeyValueSite, Method, Site, WeightSite
from adapters._interop import peft_ia3, peft_lora
from adapters._interop.files import PeftFiles, Stored
from adapters._interop.folder import PREFIX
from adapters._interop.layers import PARTS, kind_of, layers_of, stored_shape
from adapters._interop.parameters import file_keys, parameters_of, stored
from adapters._interop.peft_names import taken_otherwise
from adapters._interop.peft_prefix import FLAT, flat, prefix_config
from adapters._interop.targets import base_modules, shortest
from adapters.methods.dora import DoRA
from adapters.methods.ia3 import IA3
from adapters.methods.lora import LoRA
from adapters.methods.prefix import Prefix
from adapters.methods.qlora import QLoRA

PEFT = "0.21.2"  # whose format this is; said where formats before it differ
REGISTRY_TYPE = "ADAPTERS"  # the peft_type of what only this library can read
TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)


def express(
    model: nn.Module,
    method: Method,
    sites: Sequence[Site],
    head: Sequence[str],
    tensors: Sequence[str],
    base: str | None,
) -> PeftFiles | str:
    """The adapter in PEFT's words, or the reason why PEFT has none for it.

    Args:
        tensors: our names of the adapter's tensors.
        base: the base's name on the Hub, if it has one.
    """
    method = method.lora() if isinstance(method, QLoRA) else method
    if isinstance(method, Prefix):
        return _prefix(model, method, sites, head, base)
    if not isinstance(method, LoRA | DoRA | IA3):
        return f"PEFT has no method that computes what {method.name!r} does"
    modules = base_modules(model)
    reason = next((reason for site in sites if (reason := _inexpressible(method, site, modules))), None)
    if reason is not None:
        return reason
    weights = [site for site in sites if isinstance(site, WeightSite)]
    own = _own(method, weights, tensors, modules)
    if isinstance(own, str):
        return own
    read = [site for site in weights if kind_of(site, modules[site.owner]) == "parameter"]
    notes: tuple[str, ...] = ()
    if read and own["lora_dropout"]:
        own, notes = {**own, "lora_dropout": 0.0}, ("PEFT has no dropout beside target_parameters: it is 0 there.",)
    taken = taken_otherwise(model, own, weights) if own["peft_type"] == "LORA" else ""
    if taken:
        return taken
    saved = _heads(head, modules)
    if saved is None:
        return f"PEFT's modules_to_save cannot name {', '.join(head)} alone"
    transposed = any(site.transposed and kind_of(site, modules[site.owner]) == "linear" for site in weights)
    if transposed and read:
        return "PEFT adapts no parameters beside layers that store their weight as (n_in, n_out)"
    config = _config(own, saved, transposed, _task(model, head), base)
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return PeftFiles(text, *_stored(method, weights, tensors, modules), notes)


def _prefix(
    model: nn.Module, method: Prefix, sites: Sequence[Site], head: Sequence[str], base: str | None
) -> PeftFiles | str:
    state, task = state_of(model), _task(model, head)
    own = prefix_config(method, sites, state.map if state is not None else None, task)
    if isinstance(own, str) or head:
        return own if isinstance(own, str) else "PEFT trains no heads beside the prefixes of a language model"
    found = {"auto_mapping": None, "base_model_name_or_path": base, "inference_mode": True, "revision": None}
    text = (json.dumps({**found, "task_type": task, **own}, indent=2, sort_keys=True) + "\n").encode()
    attentions = [site for site in sites if isinstance(site, KeyValueSite)]
    orders = {
        f"{site.path}:{name}": flat(site, method.length, name) for site in attentions for name in ("keys", "values")
    }
    return PeftFiles(text, dict.fromkeys(orders, FLAT), {}, orders)


def marker(record: Mapping[str, Any], head: Sequence[str], base: str | None) -> bytes:
    """The configuration of an adapter that PEFT has no words for: the bridge finds it, other programs refuse it."""
    config = {
        "peft_type": REGISTRY_TYPE,
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "method": dict(record),
        "head": list(head),
        "saved": True,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _own(
    method: LoRA | DoRA | IA3, sites: Sequence[WeightSite], tensors: Sequence[str], modules: Mapping[str, nn.Module]
) -> dict[str, Any] | str:
    """What the method's own configuration says, its targets included, or why it cannot."""
    if isinstance(method, IA3):
        return peft_ia3.ia3_config(method, sites, tensors, modules)
    layers = layers_of(sites, modules)
    read = {place for place, layer in layers.items() if layer.kind == "parameter"}
    targets, parameters = shortest(layers.keys() - read, modules), shortest(read, parameters_of(modules))
    if targets is None or parameters is None:
        return "no list of module names selects exactly the adapted modules"
    own = peft_lora.lora_config(method, {place: layer.site for place, layer in layers.items()})
    if isinstance(own, str):
        return own
    # an empty list and not none: without one, PEFT chooses modules by the type of the model
    own |= {"target_modules": targets}
    return own | ({"target_parameters": parameters, "peft_version": PEFT} if read else {})


def _inexpressible(method: LoRA | DoRA | IA3, site: Site, modules: dict[str, nn.Module]) -> str:
    if not isinstance(site, WeightSite):
        return f"{site.path} is not a weight"
    kind = kind_of(site, modules[site.owner])
    if kind is None:
        how = "called as a module" if site.access == "call" else "read as a parameter and not called as a module"
        return f"PEFT cannot adapt {site.path}, which is {how} of the class {base_class(modules[site.owner]).__name__}"
    if kind == "parameter" and not isinstance(method, LoRA):
        return f"PEFT has LoRA alone for {site.path}, which is read as a parameter and not called as a module"
    if kind != "linear":
        # PEFT's DoRA takes the norms of tables and kernels over other axes, and it has no bias there
        alike = isinstance(method, LoRA) and not method.bias
        return "" if alike else f"PEFT computes something else than {method.name!r} does at {site.path}"
    shared = [path for path in site.aliases if isinstance(modules.get(path.rpartition(".")[0]), nn.Linear)]
    return f"{site.path} is also {shared[0]}, and PEFT would adapt only one of the two" if shared else ""


def _heads(head: Sequence[str], modules: dict[str, nn.Module]) -> list[str] | None:
    """Names for modules_to_save, which PEFT compares with the end of a path, dot or no dot."""
    names = [path.rpartition(".")[2] for path in head]
    if all({path for path in modules if path.endswith(name)} <= set(head) for name in names):
        return sorted(set(names))
    alone = all({path for path in modules if path.endswith(name)} == {name} for name in head)
    return sorted(head) if alone else None


def _task(model: nn.Module, head: Sequence[str]) -> str | None:
    name = base_class(model).__name__
    for ending, task in TASKS:
        # with these task types PEFT trains and expects the head
        if name.endswith(ending):
            return task if head else None
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"


def _config(
    own: dict[str, Any], saved: list[str], transposed: bool, task: str | None, base: str | None
) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "modules_to_save": saved or None,
        "revision": None,
        "task_type": task,
        **own,
    }


def _stored(
    method: LoRA | DoRA | IA3, sites: Sequence[WeightSite], tensors: Sequence[str], modules: dict[str, nn.Module]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, Stored]]:
    """PEFT's name for each tensor, and its shape, or shape and order of axes, where those are others than ours."""
    layers = {layer.site.path: layer for layer in layers_of(sites, modules).values()}
    wrapped = file_keys([layer.site for layer in layers.values() if layer.kind == "parameter"], modules)
    keys, shapes, orders = {}, {}, {}
    for key in tensors:
        path, _, name = key.rpartition(":")
        if path not in layers:
            keys[key] = f"{PREFIX}{path}.{name.removeprefix('head.')}"
            continue
        site, kind = layers[path]
        if kind == "parameter" and isinstance(method, LoRA):
            part, order = stored(site, method.at(site).rank, modules[site.owner])[name]
            if site.experts is not None or part != name:
                orders[key] = order
            keys[key] = f"{PREFIX}{wrapped[path]}.{PARTS[kind][part]}"
            continue
        parts = peft_ia3.PARTS if isinstance(method, IA3) else PARTS[kind]
        keys[key] = f"{PREFIX}{site.owner}.{parts[name]}"
        shape = None if isinstance(method, IA3) else stored_shape(kind, name, site, method.at(site).rank)
        if shape is not None:
            shapes[key] = shape
    return keys, shapes, orders
