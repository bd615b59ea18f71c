"""Sub-blocks of models whose residual is not a plain sum, such as hyper-connections: found by shape instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from adapters._contract import Key
from adapters._sites.graph import Call, Graph, Value, ancestors
from adapters._sites.streams import CONTAINERS, Branch, kind_of
from adapters._sites.weights import block_of


def unbranched(graph: Graph, modules: Mapping[str, nn.Module], branches: list[Branch]) -> list[Branch]:
    """In blocks without a branch: the outermost calls inside that hold a site and return what has an input's shape."""
    covered = {block_of(b.call.path) for b in branches}
    widths = {b.returned.shape[-1] for b in branches}
    found: list[Branch] = []
    last: dict[str, Call] = {}
    for call in sorted(graph.calls, key=lambda call: call.order):
        block = block_of(call.path)
        nested = block in last and call.end <= last[block].end
        if not block or block in covered or call.path == block or nested:
            continue
        branch = _as_branch(graph, modules, call)
        if branch is not None and (not widths or branch.returned.shape[-1] in widths):
            last[block] = call
            found.append(branch)
    return found


def _as_branch(graph: Graph, modules: Mapping[str, nn.Module], call: Call) -> Branch | None:
    module = modules[call.path]
    if isinstance(module, CONTAINERS) or not any(module.children()):
        return None
    uses = [use for use in graph.uses if use.linear and call.holds(use.index)]
    for key, start, value in _through(call) if uses else ():
        inside = ancestors(value, start.index)
        used = [use for use in uses if use.index in inside]
        if used and start.index in inside:
            branch = Branch(start, value, value, inside, used, call, key, value, kind="")
            branch.kind = kind_of(graph, branch)
            return branch
    return None


def _through(call: Call) -> Iterator[tuple[Key, Value, Value]]:
    """Outputs of a call with an input of the same shape."""
    for key, value in call.outputs.items():
        for slot, start in call.inputs.items():
            if not isinstance(slot, tuple) and start.shape == value.shape and len(value.shape) >= 2:
                yield key, start, value
