"""The layers of a model as sites: where hidden states enter each block of a stack, one per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from math import prod

from torch import nn

from adapters._contract import LayerSite
from adapters._sites.graph import Call, Graph
from adapters._sites.probe import TOKENS
from adapters._sites.streams import mixes_tokens
from adapters._sites.weights import block_of

_APART = "no token meets another in it when it runs here, so virtual tokens would be seen by none"


def layer_sites(graph: Graph, modules: Mapping[str, nn.Module]) -> list[LayerSite]:
    """The blocks of the largest stack whose hidden states have a position per token, in order of execution."""
    stacks: dict[tuple[str, int], dict[str, LayerSite]] = defaultdict(dict)
    for call in sorted(graph.calls, key=lambda call: call.order):
        site = _layer(call) if call.path and block_of(call.path) == call.path else None
        entry = _entry(modules, call.path) if site is not None else None
        if site is not None and entry is not None:
            stacks[call.path.rpartition(".")[0], site.width].setdefault(call.path, site)
    stack = max(stacks.values(), key=lambda stack: _size(stack, modules), default={})
    reason = "" if any(_mixes(graph, path) for path in stack) else _APART
    return [replace(site, default=not reason, reason=reason) for site in stack.values()]


def _mixes(graph: Graph, path: str) -> bool:
    """Whether tokens meet in a call of this module, in an attention or otherwise."""
    meet = graph.mixers | graph.softmax_attentions | {attention.query.index for attention in graph.attentions}
    return any(
        value.index in meet or mixes_tokens(graph, value)
        for call in graph.calls_of[path]
        for value in graph.values[call.start : call.end]
    )


def _layer(call: Call) -> LayerSite | None:
    """A site where the first of a block's inputs, and one of its outputs, are (rows, tokens, width) or the like."""
    for slot, value in call.inputs.items():
        shape = value.shape
        if isinstance(slot, tuple) or len(shape) != 3 or TOKENS not in shape[:2]:
            continue
        returned = next((key for key, out in call.outputs.items() if out.shape == shape), ...)
        if returned is not ...:
            axis = 1 if shape[1] == TOKENS else 0
            return LayerSite(call.path, shape[-1], slot, returned, axis, block_of(call.path))
    return None


def _entry(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The innermost module around a layer that is given token ids."""
    while path:
        path = path.rpartition(".")[0]
        if {"input_ids", "inputs"} & set(signature(modules[path].forward).parameters):
            return path
    return None


def _size(stack: Mapping[str, LayerSite], modules: Mapping[str, nn.Module]) -> int:
    return sum(prod(p.shape) for path in stack for p in modules[path].parameters())
