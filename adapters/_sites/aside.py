"""Weights that are sites but not adapted by default, and weights that are no sites at all, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from adapters._contract import WeightSite
from adapters._fourbit import elements, shape_of
from adapters._heads import base_model, output_embeddings
from adapters._sites.graph import Graph, Use, Value, ancestors
from adapters._sites.streams import Branch
from adapters._sites.weights import block_of, matrix, obstacle, split

_TIED = "tied to an embedding; a change would also change the embedding"
_HEAD = "a head: it follows the last residual stream"
_OUTSIDE = "a head: it lies outside the base model"
_ROUTER = "chooses or weighs experts; adapting it changes the routing"
NO_GRADIENT = "its output only selects, so its weight gets no gradient"
_BESIDE = "a convolution beside linear weights: name it to adapt it"
_LINEAR = "adds a linear function of the stream beside the feed-forward: name it to adapt it"
_UNMULTIPLIED = "multiplies no activations: it is added, scaled or compared"
_UNCALLED = "the probe did not reach it: an example= that does makes it a site"
_MULTIPLY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    """Role and reason of every multiplied weight that stays outside the default."""
    head = output_embeddings(model)
    output = {id(p) for p in head.parameters()} if head is not None else set()
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    base = base_model(model)
    inside = {id(p) for p in base.parameters()} if base is not None else None
    after = _after_the_stream(graph, branches)
    trained = differentiable(graph.results)
    outside = {w for w in graph.uses_of if w in parameters and inside is not None and id(parameters[w]) not in inside}
    beside = _convolutions_beside(graph, branches, after | outside)

    def verdict(weight: str, uses: list[Use]) -> tuple[str, str] | None:
        role, this = roles.get(weight, "other"), id(parameters[weight])
        if this in embedded:
            return "embedding-tied", _TIED
        if this in output:
            return "head", "the output embeddings"
        if weight in after:
            return "head", _HEAD
        if inside is not None and this not in inside:
            return "head", _OUTSIDE
        if role == "router":
            return role, _ROUTER
        if weight in beside:
            return role, _BESIDE
        return None if any(use.index in trained for use in uses) else (role, NO_GRADIENT)

    verdicts = {w: verdict(w, uses) for w, uses in graph.uses_of.items() if w in parameters}
    return {weight: found for weight, found in verdicts.items() if found is not None}


def branch_aside(
    branch: Branch, *, branches: list[Branch], trained: set[int], aside: Mapping[str, tuple[str, str]], inside: set[str]
) -> str:
    """Why nothing acts on what a branch adds unless it is named, or nothing; `inside` are the base model's modules."""
    if inside and branch.call.path not in inside:
        return _OUTSIDE
    if branch.returned.index not in trained:
        return NO_GRADIENT
    weights = {weight for use in branch.uses for weight in use.weights}
    if all(aside.get(weight, ("", ""))[1] == _ROUTER for weight in weights):
        return _ROUTER
    beside = [b for b in branches if b.kind == "mlp" and block_of(b.call.path) == block_of(branch.call.path)]
    if branch.kind == "mlp" and not branch.curved and any(other.curved for other in beside):
        return _LINEAR
    return ""


def _convolutions_beside(graph: Graph, branches: list[Branch], heads: set[str]) -> set[str]:
    """Convolutions that are not what their branch, or a model without branches, is made of."""
    kernels = {weight for weight, uses in graph.uses_of.items() if not all(use.linear for use in uses)}
    if not branches and all(weight in kernels | heads for weight in graph.uses_of):
        return set()
    own: set[str] = set()
    for branch in branches:
        if not branch.sites:
            own.update(weight for use in branch.uses for weight in use.weights)
    return kernels - own


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


def differentiable(results: list[Value]) -> set[int]:
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
) -> tuple[list[WeightSite], list[Unreached], list[Unreached]]:
    """Sites for weights the probe missed whose sibling it met, such as experts no token was sent to; and the rest.

    The rest are weights of products that are no site, and parameters that multiply nothing, in this order.
    """
    known = {id(parameters[site.path]) for site in sites}
    siblings = {pattern: site for site in reversed(sites) for pattern in _patterns(site.path)}
    more: list[WeightSite] = []
    left = list(_obstructed(graph, parameters))
    known |= {id(parameters[each.path]) for each in left}
    for path, module, parameter in _linear_like(modules, sites):
        if id(parameter) in known:
            continue
        known.add(id(parameter))
        found = [siblings[pattern] for pattern in _patterns(path) if pattern in siblings]
        if found and type(modules[found[0].owner]) is type(module):
            more.append(_like(found[0], path, *matrix(parameter)))
        else:
            left.append(Unreached(path, _UNCALLED, prod(matrix(parameter))))
    return more, left, list(_others(graph, modules, parameters, known))


def _others(
    graph: Graph, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter], known: set[int]
) -> Iterator[Unreached]:
    """Every other parameter of two or more dimensions: nothing of a model's weights goes unmentioned."""
    for path, parameter in parameters.items():
        if len(shape_of(parameter)) < 2 or id(parameter) in known:
            continue
        known.add(id(parameter))
        table = isinstance(modules[split(path)[0]], nn.Embedding)
        unreached = f"a table; {_UNCALLED}" if table else _UNCALLED
        yield Unreached(path, _UNMULTIPLIED if path in graph.touched else unreached, elements(parameter))


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
    """Weights of the layers that multiply: linear ones, convolutions, and whatever class was met as a site's owner."""
    met = {type(modules[site.owner]) for site in sites if site.access == "call" or site.folded}
    for owner, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and len(shape_of(weight)) >= 2 and (type(module) in met or isinstance(module, _MULTIPLY)):
            yield (f"{owner}.weight" if owner else "weight"), module, weight


def _obstructed(graph: Graph, parameters: Mapping[str, nn.Parameter]) -> Iterator[Unreached]:
    for weight, uses in graph.uses_of.items():
        reason = obstacle(parameters[weight], uses) if weight in parameters else ""
        if reason:
            yield Unreached(weight, reason, elements(parameters[weight]))
