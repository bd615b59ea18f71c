"""AdapterHub's LoRA and IA3 in our words.

LoRA (src/adapters/methods/lora.py): W' = W + (alpha / r) B A. A fused projection of queries, keys and values
(LoRAMergedLinear) has one product a part: A (r parts, n_in), B (n_out / 3 parts, r), which together are one product of
rank r parts whose B has blocks on the rows of each part. IA3 is the mode "scale" of the same class: y' = l * (W x + b).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters._contract import WeightSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import CONFIG
from adapters._interop.hub_folder import (
    FromHub,
    HubFiles,
    by_owner,
    flag,
    number,
    parsed_version,
    refuse_options,
    require_layers,
)
from adapters._interop.layers import layers_of
from adapters._interop.patterns import from_peft
from adapters._interop.targets import base_modules
from adapters._sites import SiteMap
from adapters.methods.ia3 import IA3
from adapters.methods.lora import LoRA

NEUTRAL = {
    "alpha", "architecture", "attn_matrices", "composition_mode", "dropout", "dtype", "init_weights",
    "init_weights_seed", "intermediate_lora", "leave_out", "output_lora", "r", "selfattn_lora",
}  # fmt: skip
KNOWN: dict[str, Any] = {"use_gating": False, "vera_b": None, "vera_d": None}
LETTERS = ("q", "k", "v")  # in the order of a fused projection's parts
ROLES = {"attention.query": "q", "attention.key": "k", "attention.value": "v"}


def read_lora(own: Mapping[str, Any], files: HubFiles, model: nn.Module, sites: SiteMap) -> FromHub:
    """A LoRA with AdapterHub's options `own`, or an IA3, which it keeps under the same name."""
    if own.get("use_dora"):
        raise AdapterError(
            f"{CONFIG} sets use_dora: AdapterHub's DoRA scales the bias as well and takes the norm of a change that is "
            "not scaled, which is another function than DoRA here."
        )
    refuse_options(own, {*NEUTRAL, "use_dora"}, KNOWN)
    owners = by_owner(files, "loras", model)
    known = {path: layer.site for path, layer in layers_of(sites.weights, base_modules(model)).items()}
    linear = {path: site for path, site in known.items() if site.role != "embedding" and not site.folded}
    for owner in owners:
        if owner not in linear:
            raise AdapterError(f"the adapter changes {owner}, which is no linear layer of this model.")
    require_layers(owners, sites.weights, own.get("leave_out"))
    adapted = {owner: site for owner, site in linear.items() if owner in owners}
    _require_matrices(own, adapted.values())
    if own.get("composition_mode", "add") == "scale":
        return _ia3(own, owners, adapted)
    if own.get("composition_mode", "add") != "add":
        raise AdapterError(f"{CONFIG} sets composition_mode to {str(own['composition_mode'])[:60]!r}.")
    return _lora(own, owners, adapted, parsed_version(files.config.get("version")))


def _require_matrices(own: Mapping[str, Any], sites: Collection[WeightSite]) -> None:
    """The weights must be those that the options name; of attentions only where they are not fused."""
    beside = Counter(site.block for site in sites if not site.role.startswith("attention."))
    many = flag(own, "intermediate_lora", False) + flag(own, "output_lora", False)
    if any(beside[site.block] != many for site in sites):
        raise DamagedAdapter(f"the file changes other weights of feed-forwards than {CONFIG} says.")
    roles = {site.role for site in sites if site.role.startswith("attention.")}
    wanted = set(own.get("attn_matrices", ("q", "v"))) & set(LETTERS) if flag(own, "selfattn_lora", True) else set()
    if roles == {"attention.qkv"} and wanted:
        return
    found = {ROLES.get(role, role) for role in roles}
    if found != wanted:
        raise DamagedAdapter(f"the file changes {sorted(found)} of attentions, and {CONFIG} names {sorted(wanted)}.")


def _lora(
    own: Mapping[str, Any],
    owners: Mapping[str, dict[str, Tensor]],
    adapted: Mapping[str, WeightSite],
    version: tuple[int, ...] | None,
) -> FromHub:
    rank, alpha, notes = int(number(own["r"], "r")), number(own["alpha"], "alpha"), []
    if version is not None and version < (1, 1, 0) and alpha != rank:
        alpha = float(rank)  # as AdapterHub loads it: github.com/adapter-hub/adapters/pull/770
        notes.append(f"AdapterHub before 1.1 did not scale by alpha / r: alpha is {rank} and not {own['alpha']}.")
    ours: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for owner, site in adapted.items():
        parts = owners[owner]
        _require_parts(parts, {"lora_A", "lora_B"}, owner)
        a, b = _whole(parts["lora_A"], parts["lora_B"], site, _fused(own, site), rank)
        ours |= {f"{site.path}:a": a, f"{site.path}:b": b}
        ranks[owner] = a.shape[0]
    alphas = {owner: alpha * (held / rank) for owner, held in ranks.items()}
    (one, ranked), (usual, scaled) = from_peft(ranks, rank), from_peft(alphas, alpha)
    method = LoRA(
        one, usual, dropout=number(own.get("dropout") or 0.0, "dropout"), rank_pattern=ranked, alpha_pattern=scaled
    )
    return FromHub(method, tuple(adapted.values()), ours, notes=tuple(notes))


def _whole(a: Tensor, b: Tensor, site: WeightSite, parts: list[int], rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, n_in) and B (n_out, rank) of one product, also of a fused projection's several."""
    if a.shape == (rank, site.n_in) and b.shape == (site.n_out, rank):
        return a, b
    third, many = site.n_out // 3, len(parts)
    if not parts or a.shape != (rank * many, site.n_in) or b.shape != (third * many, rank):
        raise AdapterError(f"the adapter's A {list(a.shape)} and B {list(b.shape)} do not fit {site.owner} here.")
    whole = torch.zeros(site.n_out, rank * many, dtype=b.dtype)
    for i, part in enumerate(parts):
        whole[third * part : third * (part + 1), rank * i : rank * (i + 1)] = b[third * i : third * (i + 1)]
    return a, whole


def _fused(own: Mapping[str, Any], site: WeightSite) -> list[int]:
    """Which thirds of a fused projection's outputs are changed; none where the layer is no such projection."""
    if site.role != "attention.qkv" or site.n_out % 3:
        return []
    return [i for i, letter in enumerate(LETTERS) if letter in own.get("attn_matrices", ())]


def _ia3(own: Mapping[str, Any], owners: Mapping[str, dict[str, Tensor]], adapted: Mapping[str, WeightSite]) -> FromHub:
    if own["r"] != 1 or own["alpha"] != 1:
        raise AdapterError(f"{CONFIG} sets r {own['r']!r} and alpha {own['alpha']!r}, and IA3 has 1 and 1.")
    ours: dict[str, Tensor] = {}
    for owner, site in adapted.items():
        _require_parts(owners[owner], {"lora_B"}, owner)
        held, thirds = owners[owner]["lora_B"], _fused(own, site)
        if held.shape == (site.n_out // 3 * len(thirds), 1) and thirds:
            whole = torch.ones(3, site.n_out // 3, dtype=held.dtype)
            whole[thirds] = held.view(len(thirds), -1)
            held = whole.view(-1, 1)
        if held.shape != (site.n_out, 1):
            raise AdapterError(f"the adapter's scaling of {owner} is {list(held.shape)}, not {[site.n_out, 1]}.")
        ours[f"{site.path}:output"] = held
    return FromHub(IA3(feedforward=()), tuple(adapted.values()), ours)


def _require_parts(parts: Mapping[str, Tensor], expected: set[str], owner: str) -> None:
    for part in sorted(expected ^ set(parts)):
        what = "lacks" if part in expected else "holds"
        raise DamagedAdapter(f"the file {what} {part} of {owner}, unlike what {CONFIG} says.")
