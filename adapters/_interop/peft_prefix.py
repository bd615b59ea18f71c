"""PEFT's prefix tuning in our words and back: one flat tensor of all layers, keys before values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters._contract import KeyValueSite, Site
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.files import Stored
from adapters._interop.folder import FromPeft, trained_heads
from adapters._interop.prefix_proof import require_as_cached
from adapters._sites import SiteMap
from adapters.methods.prefix import Prefix

FLAT = "prompt_embeddings"
HEADS = "base_model."  # its wrapper is one level thinner than LoRA's


def prefix_config(
    method: Prefix, sites: Sequence[Site], known: SiteMap | None, task: str | None
) -> dict[str, Any] | str:
    """The fields of a prefix configuration, or why there are none that PEFT would read as this adapter.

    Args:
        known: every site of the model.
        task: PEFT's word for what the model does.
    """
    attentions = [site for site in sites if isinstance(site, KeyValueSite)]
    shapes = {(site.heads, site.k_dim, site.v_dim) for site in attentions}
    if method.positions != "shifted":
        return "PEFT's prefixes move the real tokens: only those attached with positions='shifted' are its own"
    if task != "CAUSAL_LM":
        return "PEFT's prefixes are written for causal language models alone"
    if len(attentions) != len(sites) or known is None or [s for s in known.keyvalues if s.default] != attentions:
        return "PEFT's prefixes are at every attention of a model"
    if len(shapes) != 1 or not all(k_dim == v_dim for _, k_dim, v_dim in shapes):
        return "PEFT's prefixes have keys and values of one size, and the same in every layer"
    heads, width, _ = next(iter(shapes))
    return {
        "encoder_hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_layers": len(attentions),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": method.length,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": heads * width,
    }


def flat(site: KeyValueSite, length: int, name: str) -> Stored:
    """Our keys or values of an attention, (heads, length, dim), as their part of PEFT's flat tensor."""
    return Stored((1, 0, 2), (length, site.heads * (site.k_dim if name == "keys" else site.v_dim)))


def read_prefix(config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    layers = [site for site in sites.keyvalues if site.default]
    if FLAT not in tensors:
        raise DamagedAdapter(f"the file lacks {FLAT}, the tensor of PEFT's prefix tuning.")
    whole = tensors.pop(FLAT)
    head, trained = trained_heads(config, tensors, model, HEADS)
    length = int(config["num_virtual_tokens"])
    widths = [site.heads * (site.k_dim + site.v_dim) for site in layers]
    if whole.shape != (length, sum(widths)) or config.get("num_layers") != len(layers):
        raise AdapterError(
            f"the adapter's prefix is {list(whole.shape)}, {config.get('num_layers')} layers of {length} tokens; "
            f"the {len(layers)} attentions here take {[length, sum(widths)]}."
        )
    ours: dict[str, Tensor] = {}
    for site, part in zip(layers, torch.split(whole, widths, dim=1), strict=True):
        keys, values = torch.split(part, [site.heads * site.k_dim, site.heads * site.v_dim], dim=1)
        ours[f"{site.path}:keys"] = _by_head(keys, site)
        ours[f"{site.path}:values"] = _by_head(values, site)
    shifted: Literal["shifted"] = "shifted"
    method = Prefix(length=length, positions=shifted)
    require_as_cached(model, method, layers, ours)
    return FromPeft(
        method,
        tuple(layers),
        head,
        ours | trained,
        config.get("base_model_name_or_path"),
    )


def _by_head(part: Tensor, site: KeyValueSite) -> Tensor:
    """`(length, heads * dim)` to `(heads, length, dim)`."""
    return part.reshape(part.shape[0], site.heads, -1).transpose(0, 1).contiguous()
