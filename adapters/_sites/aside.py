"""Weights that are sites but not adapted by default, and weights that are no sites at all, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from adapters._contract import WeightSite
from adapters._heads import output_embeddings
from adapters._sites.graph import Graph, Use, Value, ancestors
from adapters._sites.streams import Branch
from adapters._sites.weights import block_of, matrix, obstacle, split

_TIED = "tied to an embedding; a change would also change the embedding"
_HEAD = "a head: it follows the last residual stream"
_ROUTER = "chooses or weighs experts; adapting it changes the routing"
_NO_GRADIENT = "its output only selects, so its weight gets no gradient"


@dataclass(frozen=True)
class Unreached:
    """A weight of `size` parameters that is no site, and why."""

    path: str
    reason: str
    size: int


def set_aside(
    graph: Graph,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, str],
    branches: list[Branch],
) -> dict[str, tuple[str, str]]:
    """Role and reason of every used weight that stays outside the default."""
    head = output_embeddings(model)
    output = {id(p) for p in head.parameters()} if head is not None else set()
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    after = _after_the_stream(graph, branches)
    trained = _differentiable(graph.results)

    def verdict(weight: str, uses: list[Use]) -> tuple[str, str] | None:
        role = roles.get(weight, "other")
        if id(parameters[weight]) in embedded:
            return "embedding-tied", _TIED
        if id(parameters[weight]) in output:
            return "head", "the output embeddings"
        if weight in after:
            return "head", _HEAD
        if role == "router":
            return role, _ROUTER
        return None if any(use.index in trained for use in uses) else (role, _NO_GRADIENT)

    verdicts = {w: verdict(w, uses) for w, uses in graph.uses_of.items() if w in parameters}
    return {weight: found for weight, found in verdicts.items() if found is not None}


def _after_the_stream(graph: Graph, branches: list[Branch]) -> set[str]:
    """Weights that the last sum of the residual stream does not depend on, outside the blocks that have branches."""
    if not branches:
        return set()
    last = max((branch.total for branch in branches), key=lambda value: value.index)
    before = ancestors(last)
    blocks = {block_of(branch.call.path) for branch in branches} - {""}
    return {
        weight
        for weight, uses in graph.uses_of.items()
        if block_of(weight) not in blocks and not any(use.index in before for use in uses)
    }


def _differentiable(results: list[Value]) -> set[int]:
    """Indices of the values from which a gradient can flow: not through indices, comparisons and detached tensors."""
    seen: set[int] = set()
    todo = list(results)
    while todo:
        value = todo.pop()
        if value.index not in seen and value.floating:
            seen.add(value.index)
            todo.extend(() if value.op == "detach" else value.parents)
    return seen


def generalise(
    sites: list[WeightSite],
    graph: Graph,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
) -> tuple[list[WeightSite], list[Unreached]]:
    """Sites for weights the probe missed whose sibling it met, such as experts no token was sent to; and the rest."""
    known = {id(parameters[site.path]) for site in sites}
    siblings = {pattern: site for site in reversed(sites) for pattern in _patterns(site.path)}
    more: list[WeightSite] = []
    left = list(_obstructed(graph, parameters))
    for path, module, parameter in _linear_like(modules, sites):
        if id(parameter) in known:
            continue
        known.add(id(parameter))
        found = [siblings[pattern] for pattern in _patterns(path) if pattern in siblings]
        if found and type(modules[found[0].owner]) is type(module):
            more.append(_like(found[0], path, *matrix(module, parameter)))
        else:
            left.append(Unreached(path, "the probe did not call it", prod(matrix(module, parameter))))
    return more, left


def _patterns(path: str) -> list[str]:
    """The path with one of its numbers left open: siblings differ in the block or in the expert, not in both."""
    parts = path.split(".")
    return [".".join([*parts[:i], "*", *parts[i + 1 :]]) for i, part in enumerate(parts) if part.isdigit()]


def _like(sibling: WeightSite, path: str, rows: int, columns: int) -> WeightSite:
    n_out, n_in = (columns, rows) if sibling.transposed else (rows, columns)
    owner = split(path)[0]
    return replace(sibling, path=path, owner=owner, n_in=n_in, n_out=n_out, block=block_of(path), aliases=())


def _linear_like(
    modules: Mapping[str, nn.Module], sites: list[WeightSite]
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    called = {type(modules[site.owner]) for site in sites if site.access == "call"} | {nn.Linear}
    for owner, module in modules.items():
        weight = module._parameters.get("weight")
        if type(module) in called and weight is not None and weight.dim() == 2:
            yield (f"{owner}.weight" if owner else "weight"), module, weight


def _obstructed(graph: Graph, parameters: Mapping[str, nn.Parameter]) -> Iterator[Unreached]:
    for weight, uses in graph.uses_of.items():
        reason = obstacle(parameters[weight], uses) if weight in parameters else ""
        if reason:
            yield Unreached(weight, reason, parameters[weight].numel())
