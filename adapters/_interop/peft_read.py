"""Reads an adapter that stock PEFT wrote: LoRA with one rank and scale, and prefix tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters._contract import KeyValueSite, Method, Site, WeightSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.peft_write import PARTS, PREFIX
from adapters._interop.targets import base_modules, matched, pattern_value, suffix_of
from adapters._sites import SiteMap
from adapters.methods.lora import LoRA
from adapters.methods.prefix import Prefix

CONFIG = "adapter_config.json"
# fields that do not change what a finished adapter computes
NEUTRAL = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
NEUTRAL_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights
NEUTRAL_PREFIX = NEUTRAL | {
    "encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "num_virtual_tokens", "prefix_projection", "token_dim",
}  # fmt: skip


@dataclass(frozen=True)
class FromPeft:
    """An adapter in our words: what `install` takes, and the base that the folder claims to be for."""

    method: Method
    sites: tuple[Site, ...]
    head: tuple[str, ...]
    tensors: dict[str, Tensor]
    base: str | None


def parse_config(raw: bytes) -> dict[str, Any]:
    """`adapter_config.json` as a dictionary, or DamagedAdapter."""
    try:
        config = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedAdapter(f"{CONFIG} is truncated or damaged: it is not JSON.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise DamagedAdapter(f"{CONFIG} does not name a PEFT type.")
    return config


def understand(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    """A PEFT adapter in our words, every tensor accounted for.

    Raises:
        AdapterError: PEFT options that we do not compute, by name, or modules that this model has not.
        DamagedAdapter: tensors are missing or superfluous.
    """
    readers = {"LORA": _lora, "PREFIX_TUNING": _prefix}
    kind = config["peft_type"]
    if kind not in readers:
        raise AdapterError(f"the folder holds PEFT's {kind}; of PEFT's methods, {' and '.join(readers)} can be read.")
    _refuse_options(config, NEUTRAL if kind == "LORA" else NEUTRAL_PREFIX)
    try:
        return readers[kind](config, dict(tensors), model, sites)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedAdapter(f"{CONFIG} lacks a field or holds one of another type: {error}.") from error


def _refuse_options(config: Mapping[str, Any], neutral: set[str]) -> None:
    for key, value in config.items():
        if key not in neutral and value not in (None, False, 0, "", [], {}) and (key, value) != ("bias", "none"):
            raise AdapterError(
                f"{CONFIG} sets {key} to {str(value)[:60]!r}, an option of PEFT's that is not supported."
            )
    start = config.get("init_lora_weights", True)
    if start not in NEUTRAL_STARTS:
        raise AdapterError(f"{CONFIG} sets init_lora_weights to {start!r}, which changes the weights of the base.")


def _lora(config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    owners = {site.owner: site for site in sites.weights if site.access == "call"}
    found: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.endswith(tuple(PARTS.values()))]:
        owner, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        found.setdefault(owner, {})["a" if part == "A.weight" else "b"] = tensors.pop(key)
    ours: dict[str, Tensor] = {}
    for owner, parts in found.items():
        if owner not in owners:
            raise AdapterError(f"the adapter changes {owner}, which is no linear layer of this model.")
        if set(parts) != set(PARTS):
            raise DamagedAdapter(f"the file holds only one of lora_A and lora_B for {owner}.")
        _check_shapes(owners[owner], parts)
        ours |= {f"{owners[owner].path}:{name}": tensor for name, tensor in parts.items()}
    _check_targets(config, set(found), set(owners))
    head, trained = _heads(config, tensors, model)
    rank, alpha = _rank_and_alpha(config, {owner: parts["a"].shape[0] for owner, parts in found.items()})
    method = LoRA(rank, alpha, bool(config.get("use_rslora", False)), float(config.get("lora_dropout") or 0.0))
    chosen = tuple(site for owner, site in owners.items() if owner in found)
    return FromPeft(method, chosen, head, ours | trained, config.get("base_model_name_or_path"))


def _check_shapes(site: WeightSite, parts: Mapping[str, Tensor]) -> None:
    a, b = parts["a"], parts["b"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != site.n_in or b.shape != (site.n_out, a.shape[0]):
        raise AdapterError(
            f"the adapter's {site.owner} is {list(b.shape)} times {list(a.shape)}, "
            f"but the layer here is {site.n_out} by {site.n_in}."
        )


def _check_targets(config: Mapping[str, Any], found: set[str], owners: set[str]) -> None:
    """What the configuration names must be in the file: PEFT itself would start the missing ones afresh."""
    if not found:
        raise DamagedAdapter("the file holds no LoRA tensor.")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    named = matched(config.get("target_modules"), owners)
    missing = sorted((named or set()) - found)
    saved = config.get("modules_to_save") or []
    missing = [path for path in missing if not any(suffix_of(name, path) for name in saved)]
    if missing:
        raise DamagedAdapter(f"the file lacks the tensors of {missing[0]}, which {CONFIG} names as a target.")


def _rank_and_alpha(config: Mapping[str, Any], ranks: Mapping[str, int]) -> tuple[int, float]:
    found = set()
    for owner, rank in ranks.items():
        expected = pattern_value(config.get("rank_pattern") or {}, owner, config["r"])
        if rank != expected:
            raise DamagedAdapter(f"{owner} has the rank {rank} in the file and {expected} in {CONFIG}.")
        found.add((rank, float(pattern_value(config.get("alpha_pattern") or {}, owner, config["lora_alpha"]))))
    if len(found) > 1:
        raise AdapterError(f"{CONFIG} gives modules different ranks or alphas, which one LoRA here cannot have.")
    return found.pop()


def _heads(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Trained heads (PEFT's modules_to_save); whatever is left over after them is refused."""
    saved = config.get("modules_to_save") or []
    paths = [path for path in base_modules(model) if any(suffix_of(str(name), path) for name in saved)]
    trained: dict[str, Tensor] = {}
    head = set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        path = next((path for path in paths if name.startswith(f"{path}.")), None)
        if path is None:
            raise DamagedAdapter(f"the file holds {key}, which is no tensor of this adapter.")
        head.add(path)
        trained[f"{path}:head.{name.removeprefix(path + '.')}"] = tensor
    return tuple(sorted(head)), trained


def _prefix(config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    layers = [site for site in sites.keyvalues if site.default]
    if "prompt_embeddings" not in tensors:
        raise DamagedAdapter("the file lacks prompt_embeddings, the tensor of PEFT's prefix tuning.")
    flat = tensors.pop("prompt_embeddings")
    head, trained = _heads(config, tensors, model)
    length = int(config["num_virtual_tokens"])
    widths = [site.heads * (site.k_dim + site.v_dim) for site in layers]
    if flat.shape != (length, sum(widths)) or config.get("num_layers") != len(layers):
        raise AdapterError(
            f"the adapter's prefix is {list(flat.shape)}, {config.get('num_layers')} layers of {length} tokens; "
            f"the {len(layers)} attentions here take {[length, sum(widths)]}."
        )
    ours: dict[str, Tensor] = {}
    for site, part in zip(layers, torch.split(flat, widths, dim=1), strict=True):
        keys, values = torch.split(part, [site.heads * site.k_dim, site.heads * site.v_dim], dim=1)
        ours[f"{site.path}:keys"] = _by_head(keys, site)
        ours[f"{site.path}:values"] = _by_head(values, site)
    shifted: Literal["shifted"] = "shifted"
    return FromPeft(
        Prefix(length=length, positions=shifted),
        tuple(layers),
        head,
        ours | trained,
        config.get("base_model_name_or_path"),
    )


def _by_head(flat: Tensor, site: KeyValueSite) -> Tensor:
    """`(length, heads * dim)` to `(heads, length, dim)`."""
    return flat.reshape(flat.shape[0], site.heads, -1).transpose(0, 1).contiguous()
