"""LoRA, DoRA and IA3 as the files that stock PEFT reads, LoRA also vLLM and mistral.rs (PEFT 0.21's format)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapters._attach.swap import base_class
from adapters._contract import Method, Site, WeightSite
from adapters._interop import peft_ia3, peft_lora
from adapters._interop.folder import PREFIX
from adapters._interop.layers import PARTS, kind_of, layers_of, stored_shape
from adapters._interop.targets import base_modules, shortest
from adapters.methods.dora import DoRA
from adapters.methods.ia3 import IA3
from adapters.methods.lora import LoRA
from adapters.methods.qlora import QLoRA

REGISTRY_TYPE = "ADAPTERS"  # the peft_type of what only this library can read
TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)


@dataclass(frozen=True)
class PeftFiles:
    """`adapter_config.json`, PEFT's name for each of our tensors, and its shape where that is another than ours."""

    config: bytes
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


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
    saved = _heads(head, modules)
    if saved is None:
        return f"PEFT's modules_to_save cannot name {', '.join(head)} alone"
    transposed = any(site.transposed and site.role != "embedding" for site in weights)
    config = _config(own, saved, transposed, _task(model, head), base)
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return PeftFiles(text, *_stored(method, weights, tensors, modules))


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
    method: LoRA | DoRA | IA3, sites: Sequence[WeightSite], tensors: Sequence[str], modules: Collection[str]
) -> dict[str, Any] | str:
    """What the method's own configuration says, its targets included, or why it cannot."""
    if isinstance(method, IA3):
        return peft_ia3.ia3_config(method, sites, tensors, modules)
    targets = shortest({site.owner for site in sites}, modules)
    if targets is None:
        return "no list of module names selects exactly the adapted modules"
    own = peft_lora.lora_config(method, sites)
    return own if isinstance(own, str) else {**own, "target_modules": targets}


def _inexpressible(method: LoRA | DoRA | IA3, site: Site, modules: dict[str, nn.Module]) -> str:
    if not isinstance(site, WeightSite):
        return f"{site.path} is not a weight"
    kind = kind_of(site, modules[site.owner])
    if kind is None:
        how = "called as a module" if site.access == "call" else "read as a parameter and not called as a module"
        return f"PEFT cannot adapt {site.path}, which is {how} of the class {base_class(modules[site.owner]).__name__}"
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
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """PEFT's name for each tensor, and its shape where that is another than ours."""
    layers = {layer.site.path: layer for layer in layers_of(sites, modules).values()}
    keys, shapes = {}, {}
    for key in tensors:
        path, _, name = key.rpartition(":")
        if path not in layers:
            keys[key] = f"{PREFIX}{path}.{name.removeprefix('head.')}"
            continue
        site, kind = layers[path]
        parts = peft_ia3.PARTS if isinstance(method, IA3) else PARTS[kind]
        keys[key] = f"{PREFIX}{site.owner}.{parts[name]}"
        shape = None if isinstance(method, IA3) else stored_shape(kind, name, site, method.at(site).rank)
        if shape is not None:
            shapes[key] = shape
    return keys, shapes
