"""Stream sites from branches, and key-value sites from attentions."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Literal, cast

from adapters._contract import NOWHERE, Key, KeyValueSite, StreamSite
from adapters._sites.aside import NO_GRADIENT, Unreached
from adapters._sites.graph import Graph, Value, ancestors
from adapters._sites.streams import Branch
from adapters._sites.weights import block_of


def stream_sites(graph: Graph, branches: list[Branch], aside: Callable[[Branch], str]) -> list[StreamSite]:
    """One site per module, though it be called several times; `aside` says why one is not default."""
    sites: dict[str, StreamSite] = {}
    for branch in _without_beside(branches):
        reason, axis = aside(branch), _axis(branch)
        slot, tap, input_axis = _input(graph, branch)
        site = StreamSite(
            path=branch.call.path,
            branch=cast(Literal["attention", "mlp", "ssm"], branch.kind),
            width=branch.returned.shape[axis],
            output=branch.key,
            input=slot,
            tap=tap,
            axis=axis,
            input_axis=input_axis,
            block=block_of(branch.call.path),
            default=not reason,
            reason=reason,
            rows=branch.call.rows.get(branch.key, NOWHERE),
        )
        sites.setdefault(site.path, site)
    return list(sites.values())


def _without_beside(branches: list[Branch]) -> list[Branch]:
    """Of several branches that one module returns, such as its tokens' and a few global ones', the largest."""
    largest: dict[str, Branch] = {}
    for branch in branches:
        known = largest.setdefault(branch.call.path, branch)
        if prod(branch.returned.shape) > prod(known.returned.shape):
            largest[branch.call.path] = branch
    return [branch for branch in branches if branch.key == largest[branch.call.path].key]


def unplaced(branches: list[Branch], loose: list[Branch]) -> list[Unreached]:
    """Branches at which nothing can act by itself, by the module in which they are added, or which returns them."""
    kept = {id(branch) for branch in _without_beside(branches)}
    found = {(branch.call.path, f"an {branch.kind} branch that no module returns by itself") for branch in loose}
    found |= {
        (branch.call.path, f"the smaller of the {branch.kind} branches that this module returns")
        for branch in branches
        if id(branch) not in kept
    }
    return [Unreached(path, reason, 0) for path, reason in sorted(found)]


def _axis(branch: Branch) -> int:
    """1 where a convolution's channels are returned as it lays them out, (rows, channels, *positions), else -1."""
    last = branch.uses[-1]
    laid = last.op.startswith("conv") and len(branch.returned.shape) == len(last.out.shape)
    return 1 if laid and last.out.shape[1:] == branch.returned.shape[1:] else -1


def _starts(branch: Branch, value: Value) -> int | None:
    """Where the features are in `value`, if it is what the branch starts from, without any weight in between."""
    if value.index not in branch.inside or prod(value.shape) != prod(branch.returned.shape):
        return None
    before = ancestors(value, branch.stream.index + 1)
    if any(v.use is not None for v in before.values()):
        return None
    axis, expected = _axis(branch), _moved(branch.returned.shape, _axis(branch))
    flat = branch.call.rows.get(branch.key, NOWHERE).layout == "flattened"
    if flat and axis == -1 and len(value.shape) > 2 and value.shape[-1] == expected[-1]:
        return -1  # the sub-block returns its rows and tokens as one axis
    # the features may be elsewhere, but all other axes are in the same order
    return next((each for each in (axis, -1, 1) if _moved(value.shape, each) == expected), None)


def _moved(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    at = axis % len(shape)
    return (*shape[:at], *shape[at + 1 :], shape[at])


def _input(graph: Graph, branch: Branch) -> tuple[Key, str | None, int]:
    """Where the branch's input is found: an argument of the site's own call, or the first one of an earlier module's.

    An earlier module is the outermost that is called with it, inside the same block and over before the site's call.
    """
    for slot, value in branch.call.inputs.items():
        axis = None if isinstance(slot, tuple) else _starts(branch, value)
        if axis is not None and not isinstance(slot, tuple):
            return slot, None, axis
    slot = _argument(branch)
    if slot is not None:
        return slot, None, _axis(branch)
    block, uses = block_of(branch.call.path), [use.index for use in branch.uses]
    for call in graph.calls_between(branch.stream.index, branch.call.start):
        over = call.end <= branch.call.start or call is branch.call
        if over and 0 in call.inputs and block_of(call.path) == block and any(map(call.holds, uses)):
            axis = _starts(branch, call.inputs[0])
            if axis is not None:
                return None, call.path, axis
    return None, None, _axis(branch)


def _argument(branch: Branch) -> Key:
    """Where a weight mixes the stream on its way to a sub-block: the argument of that shape the sub-block is given."""
    if sum(branch.call.holds(use.index) for use in branch.sites) < 2:
        return None  # a single layer is given what the branch has become by then
    for slot, value in branch.call.inputs.items():
        if not isinstance(slot, tuple) and value.shape == branch.returned.shape and value.index in branch.inside:
            return slot
    return None


def keyvalue_sites(graph: Graph, trained: set[int]) -> list[KeyValueSite]:
    """Attentions that went through transformers' interface, which is where a prefix can be prepended."""
    sites: dict[str, KeyValueSite] = {}
    for a in graph.attentions:
        if a.path and len(a.key.shape) == 4:
            heads, k_dim, v_dim = a.key.shape[1], a.key.shape[-1], a.value.shape[-1]
            reason = "" if a.query.index in trained else NO_GRADIENT
            site = KeyValueSite(
                a.path, heads, k_dim, v_dim, a.causal, block_of(a.path), not reason, reason, rows=a.rows
            )
            sites.setdefault(a.path, site)
    return list(sites.values())
