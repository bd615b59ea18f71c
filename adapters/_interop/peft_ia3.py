"""IA3 in PEFT's words and back: one tensor a module, and a list of those whose inputs are scaled."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adapters._contract import WeightSite
from adapters._errors import AdapterError
from adapters._interop.folder import PREFIX, FromPeft, require_targets, trained_heads
from adapters._interop.targets import shortest
from adapters._sites import SiteMap
from adapters.methods.ia3 import FEEDFORWARD, IA3

PARTS = {"input": "ia3_l", "output": "ia3_l"}
ENDING = f".{PARTS['input']}"


def ia3_config(
    method: IA3, sites: Sequence[WeightSite], tensors: Collection[str], modules: Collection[str]
) -> dict[str, Any] | str:
    """The fields of an IA3 configuration, or why there are none that PEFT would read as this adapter."""
    inputs = {site.owner for site in sites if f"{site.path}:input" in tensors}
    outputs = {site.owner for site in sites} - inputs
    named, rest = (shortest(owners, modules) for owners in (inputs, outputs))
    if named is None or rest is None:
        return "no list of module names selects exactly the adapted modules"
    if any(_is_feedforward(named, owner) for owner in outputs):
        return "PEFT's feedforward_modules cannot name the modules whose inputs are scaled alone"
    return {
        "exclude_modules": None,
        "feedforward_modules": named,
        "init_ia3_weights": True,
        "peft_type": "IA3",
        "target_modules": sorted({*named, *rest}),
    }


def read_ia3(config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    owners = {site.owner: site for site in sites.weights if site.access == "call"}
    ours: dict[str, Tensor] = {}
    found: dict[str, WeightSite] = {}
    for key in [key for key in tensors if key.endswith(ENDING)]:
        owner = key.removeprefix(PREFIX).removesuffix(ENDING)
        if owner not in owners:
            raise AdapterError(f"the adapter changes {owner}, which is no linear layer of this model.")
        site = found[owner] = owners[owner]
        name = "input" if _is_feedforward(config["feedforward_modules"], owner) else "output"
        shape = (1, site.n_in) if name == "input" else (site.n_out, 1)
        ours[f"{site.path}:{name}"] = tensor = tensors.pop(key)
        if tensor.shape != shape:
            raise AdapterError(
                f"the adapter's {owner} is {list(tensor.shape)}, but the layer here takes {list(shape)}."
            )
    require_targets(config, set(found), set(owners))
    head, trained = trained_heads(config, tensors, model)
    scaled = [owner for owner in found if f"{found[owner].path}:input" in ours]
    usual = [owner for owner in found if found[owner].role in FEEDFORWARD]
    method = IA3() if scaled == usual else IA3(tuple(scaled))
    chosen = tuple(site for owner, site in owners.items() if owner in found)
    return FromPeft(method, chosen, head, ours | trained, config.get("base_model_name_or_path"))


def _is_feedforward(named: Any, owner: str) -> bool:
    """As PEFT decides: a list of endings, dot or no dot, or one regular expression."""
    if isinstance(named, str):
        return re.fullmatch(named, owner) is not None
    return any(owner.endswith(str(name)) for name in named)
