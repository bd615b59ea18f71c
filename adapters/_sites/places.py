"""Stream sites from branches, and key-value sites from attentions."""

from __future__ import annotations

from typing import Literal, cast

from adapters._contract import NOWHERE, Key, KeyValueSite, StreamSite
from adapters._sites.graph import Graph, Value, ancestors
from adapters._sites.streams import Branch
from adapters._sites.weights import block_of


def stream_sites(graph: Graph, branches: list[Branch]) -> list[StreamSite]:
    """One site per module output, though the module be called several times."""
    sites: dict[tuple[str, Key], StreamSite] = {}
    for branch in branches:
        axis = _axis(branch)
        slot = _input(branch)
        tap = _tap(graph, branch) if slot is None else None
        if slot is None and tap is None:
            slot = _argument(branch)
        sites.setdefault(
            (branch.call.path, branch.key),
            StreamSite(
                path=branch.call.path,
                branch=cast(Literal["attention", "mlp", "ssm"], branch.kind),
                width=branch.returned.shape[axis],
                output=branch.key,
                input=slot,
                tap=tap,
                axis=axis,
                block=block_of(branch.call.path),
                rows=branch.call.rows.get(branch.key, NOWHERE),
            ),
        )
    return list(sites.values())


def _axis(branch: Branch) -> int:
    last = branch.uses[-1]
    image = last.op == "conv2d" and len(branch.returned.shape) == 4
    return 1 if image and last.out.shape[1] == branch.returned.shape[1] else -1


def _starts(branch: Branch, value: Value) -> bool:
    """Whether `value` is what the branch starts from: the stream, or made from it without any weight site."""
    if value.shape != branch.returned.shape or value.index not in branch.inside:
        return False
    before = ancestors(value, branch.stream.index + 1)
    return not any(v.use is not None for v in before.values())


def _input(branch: Branch) -> Key:
    for slot, value in branch.call.inputs.items():
        if not isinstance(slot, tuple) and _starts(branch, value):
            return slot
    return None


def _argument(branch: Branch) -> Key:
    """Where a weight mixes the stream on its way to a sub-block: the argument of that shape the sub-block is given."""
    if sum(branch.call.holds(use.index) for use in branch.sites) < 2:
        return None  # a single layer is given what the branch has become by then
    for slot, value in branch.call.inputs.items():
        if not isinstance(slot, tuple) and value.shape == branch.returned.shape and value.index in branch.inside:
            return slot
    return None


def _tap(graph: Graph, branch: Branch) -> str | None:
    """The first module of the branch that is given its input as first argument and holds a weight site."""
    for use in branch.sites:
        for call in graph.calls_of.get(use.module, []):
            if call.holds(use.index) and 0 in call.inputs and _starts(branch, call.inputs[0]):
                return call.path
    return None


def keyvalue_sites(graph: Graph) -> list[KeyValueSite]:
    """Attentions that went through transformers' interface, which is where a prefix can be prepended."""
    sites: dict[str, KeyValueSite] = {}
    for a in graph.attentions:
        if a.path and len(a.key.shape) == 4:
            heads, k_dim, v_dim = a.key.shape[1], a.key.shape[-1], a.value.shape[-1]
            site = KeyValueSite(a.path, heads, k_dim, v_dim, a.causal, block_of(a.path), rows=a.rows)
            sites.setdefault(a.path, site)
    return list(sites.values())
