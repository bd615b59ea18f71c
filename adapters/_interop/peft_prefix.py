"""PEFT's prefix tuning in our words: one flat tensor of all layers, keys before values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters._contract import KeyValueSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import FromPeft, trained_heads
from adapters._sites import SiteMap
from adapters.methods.prefix import Prefix


def read_prefix(config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    layers = [site for site in sites.keyvalues if site.default]
    if "prompt_embeddings" not in tensors:
        raise DamagedAdapter("the file lacks prompt_embeddings, the tensor of PEFT's prefix tuning.")
    flat = tensors.pop("prompt_embeddings")
    head, trained = trained_heads(config, tensors, model)
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
