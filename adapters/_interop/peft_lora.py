"""LoRA and DoRA in PEFT's words and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters._contract import Method, WeightSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import CONFIG, PREFIX, FromPeft, require_targets, trained_heads
from adapters._interop.layers import LINEAR, PARTS, Layer, layers_of, stored_shape
from adapters._interop.parameters import take_parameters
from adapters._interop.patterns import from_peft, pattern_value, to_peft
from adapters._interop.peft_bias import take_biases
from adapters._interop.peft_tokens import take_tokens
from adapters._interop.targets import base_modules
from adapters._sites import SiteMap
from adapters.methods.dora import DoRA
from adapters.methods.lora import LoRA

CONVERTED = "PEFT trained biases of the base: their differences from this model's are the adapter's own now."


def lora_config(method: LoRA | DoRA, places: Mapping[str, WeightSite]) -> dict[str, Any] | str:
    """The fields of a LoRA configuration that the method decides, or why there are none.

    Args:
        places: the sites by what PEFT knows them by.
    """
    held = {place: method.at(site) for place, site in places.items()}
    ranks = to_peft({owner: own.rank for owner, own in held.items()}, method.rank)
    alphas = to_peft({owner: _number(own.alpha) for owner, own in held.items()}, _number(method.alpha))
    if ranks is None or alphas is None:
        return "one adapted module's path is the end of another's, which PEFT's patterns cannot tell apart"
    return {
        "alpha_pattern": alphas,
        "bias": "none",
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _number(method.alpha),
        "lora_bias": isinstance(method, LoRA) and method.bias,
        "lora_dropout": method.dropout,
        "peft_type": "LORA",
        "r": method.rank,
        "rank_pattern": ranks,
        "use_dora": isinstance(method, DoRA),
        "use_rslora": method.rslora,
    }


def _number(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def read_lora(config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    modules = base_modules(model)
    layers = layers_of(sites.weights, modules)
    found, assumed = take_parameters(config, tensors, layers, modules)
    found |= _parts(config, tensors, layers)
    _take_tables(tensors, layers, modules)
    require_targets(config, set(found), {place for place, layer in layers.items() if layer.kind != "parameter"})
    adapted = {owner: layer.site for owner, layer in layers.items() if owner in found}
    method = _method(config, {owner: parts["a"].shape[-2] for owner, parts in found.items()})
    linear = {owner: site for owner, site in adapted.items() if layers[owner].kind == "linear"}
    shifts = take_biases(config, tensors, model, linear)
    changed = any(bool(shift.any()) for shift in shifts.values())
    if changed:
        method = _with_biases(method, linear, found, shifts)
    tokens, rows = take_tokens(config, tensors, model)
    head, trained = trained_heads(config, tensors, model)
    ours = rows | {
        f"{adapted[owner].path}:{name}": part for owner, parts in found.items() for name, part in parts.items()
    }
    base = config.get("base_model_name_or_path")
    notes = (*assumed, *((CONVERTED,) if changed else ()))
    return FromPeft(method, tuple(adapted.values()), head, ours | trained, base, notes, tokens)


def _parts(
    config: Mapping[str, Any], tensors: dict[str, Tensor], layers: Mapping[str, Layer]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapted module by our names, complete and of the right shapes."""
    names = {part: name for parts in PARTS.values() for name, part in parts.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.endswith(tuple(f".{part}" for part in names))]:
        owner, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        found.setdefault(owner, {})[f"lora_{part}"] = tensors.pop(key)
    optional = {"magnitude": "use_dora", "bias": "lora_bias"}
    wanted = {"a", "b", *(name for name, option in optional.items() if config.get(option))}
    for owner, parts in found.items():
        if owner not in layers:
            raise AdapterError(f"the adapter changes {owner}, which is no layer of this model that LoRA adapts.")
        expected = {PARTS[layers[owner].kind].get(name, LINEAR[name]) for name in wanted}
        for part in sorted(expected ^ set(parts)):
            what = "lacks" if part in expected else "holds"
            raise DamagedAdapter(f"the file {what} {part} of {owner}, unlike what {CONFIG} says.")
        found[owner] = _unfolded(layers[owner], {names[part]: held for part, held in parts.items()})
    return found


def _unfolded(layer: Layer, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in our shapes, which those of a convolution are not."""
    site, kind = layer
    if kind != "linear" and set(parts) != {"a", "b"}:
        raise AdapterError(f"the adapter has DoRA or a bias at {site.owner}, which only a linear layer can have here.")
    rank = parts["a"].shape[0] if parts["a"].dim() else 0
    shapes = {"a": (rank, site.n_in), "b": (site.n_out, rank), "bias": (site.n_out,), "magnitude": (site.n_out,)}
    for name, held in parts.items():
        shape = stored_shape(kind, name, site, rank) or shapes[name]
        if held.shape != shape:
            raise AdapterError(
                f"the adapter's {PARTS[kind][name]} at {site.owner} is {list(held.shape)}, "
                f"but the layer here takes {list(shape)}."
            )
    return {name: held.reshape(shapes[name]) for name, held in parts.items()}


def _take_tables(tensors: dict[str, Tensor], owners: Collection[str], modules: Mapping[str, nn.Module]) -> None:
    """Takes out the base's own weights, which PEFT stores beside those of an adapted table.

    Raises:
        AdapterError: they are other weights than this model's, as after tokens were added.
    """
    for key in [key for key in tensors if key.endswith(".base_layer.weight")]:
        owner = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        if owner not in owners:
            continue
        stored, base = tensors.pop(key), modules[owner].get_parameter("weight").detach()
        if stored.shape != base.shape or not torch.equal(stored.to(base), base):
            raise AdapterError(f"the file holds weights of {owner} that are not this model's: tokens were added to it.")


def _method(config: Mapping[str, Any], ranks: Mapping[str, int]) -> LoRA | DoRA:
    alphas: dict[str, float] = {}
    for owner, rank in ranks.items():
        expected = pattern_value(config.get("rank_pattern") or {}, owner, config["r"])
        if rank != expected:
            raise DamagedAdapter(f"{owner} has the rank {rank} in the file and {expected} in {CONFIG}.")
        alphas[owner] = float(pattern_value(config.get("alpha_pattern") or {}, owner, config["lora_alpha"]))
    rank, rank_pattern = from_peft(ranks, config["r"])
    alpha, alpha_pattern = from_peft(alphas, float(config["lora_alpha"]))
    shared: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "rslora": bool(config.get("use_rslora", False)),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return DoRA(**shared) if config.get("use_dora") else LoRA(**shared, bias=bool(config.get("lora_bias", False)))


def _with_biases(
    method: Method,
    adapted: Mapping[str, WeightSite],
    found: Mapping[str, dict[str, Tensor]],
    shifts: Mapping[str, Tensor],
) -> LoRA:
    """The method with a bias, and in `found` the biases e of `b' = b + s e` that make the trained ones."""
    if not isinstance(method, LoRA):
        raise AdapterError("the file holds trained biases of the base beside DoRA's tensors, and DoRA has no bias.")
    with_bias = replace(method, bias=True)
    for owner, site in adapted.items():
        own, scale = found[owner].get("bias", torch.zeros(site.n_out)), with_bias.at(site).scale
        shift = shifts.get(owner, torch.zeros(site.n_out))
        if scale == 0 and shift.any():
            raise AdapterError(f"the scale of {owner} is 0, and its bias was trained, which one LoRA cannot hold.")
        found[owner]["bias"] = own + (shift / scale if scale else 0)
    return with_bias
