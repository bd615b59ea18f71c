"""Position ids for models that run with a prefix.

Two conventions, a field of the method: "before" leaves the real tokens at 0, 1, ... with the prefix before them;
"shifted" moves them by the prefix's length, as the key-value cache of PEFT does. Left padding needs position ids in
both: without them a padded row's first token would be far from the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach.acting import Chain
from adapters._attach.per_row import PerRow
from adapters._attach.rules import shift
from adapters._attach.signature import forward_parameters
from adapters._attach.state import State, selection
from adapters._attach.swap import Call, base_class, before_forward
from adapters._contract import KeyValueMethod, KeyValueSite, Method, Site
from adapters._errors import AdapterError


def require_positions(model: nn.Module, method: Method, sites: Sequence[Site]) -> None:
    """Refuses to shift the tokens of a model that is not told where they are.

    Raises:
        AdapterError: its forward takes no `position_ids`.
    """
    moves = isinstance(method, KeyValueMethod) and method.positions == "shifted"
    attentions = any(isinstance(site, KeyValueSite) for site in sites)
    if moves and attentions and "position_ids" not in forward_parameters(base_class(model)):
        raise AdapterError(
            "positions='shifted' moves tokens by their position_ids, which the forward of a "
            f"{base_class(model).__name__} does not take: attach the prefix with positions='before'."
        )


def with_positions(model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The arguments of a forward, with the `position_ids` that the prefixes of its selection need."""
    ids = position_ids(model, state, args, kwargs)
    if ids is None:
        return args, kwargs
    at = forward_parameters(base_class(model)).index("position_ids")
    if at < len(args):
        return (*args[:at], ids, *args[at + 1 :]), kwargs
    return args, {**kwargs, "position_ids": ids}


def position_ids(model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What `position_ids` must be in a forward whose selection holds a prefix, or None where they need no change."""
    acting = selection(state)
    prefixes = [adapter for adapter in acting if isinstance(adapter.sites[0], KeyValueSite)]
    if not prefixes:
        return None
    names = forward_parameters(base_class(model))
    if "position_ids" not in names:
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    node = acting.node if acting.node is not None else Chain(tuple(acting))
    moved = shift(node.distinct[0] if isinstance(node, PerRow) else node)  # by row, all rows alike
    if given.get("position_ids") is not None:
        return given["position_ids"] + moved if moved else None
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    prefixed = [site for adapter in prefixes for site in adapter.sites if isinstance(site, KeyValueSite)]
    causal = all(site.causal for site in prefixed)
    mask = given.get("attention_mask")
    padded = causal and isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all())
    if not isinstance(tokens, Tensor) or not (moved or padded):
        return None
    count = tokens.shape[1]
    if padded and isinstance(mask, Tensor):
        ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
    else:
        cache = given.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        ids = torch.arange(start, start + count, device=tokens.device)[None].expand(tokens.shape[0], -1)
    return ids + moved


before_forward.append(with_positions)
