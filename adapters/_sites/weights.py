"""Weight sites: how a weight is stored and reached, and whether it is adapted by default."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, Literal

from torch import nn

from adapters._contract import NOWHERE, Rows, WeightSite
from adapters._fourbit import shape_of
from adapters._sites.graph import Graph, Use, Value
from adapters._sites.operands import PICKS, SUMS, VIEWS

TABLE = "a table that is looked up in: name it to adapt it"


def block_of(path: str) -> str:
    """The path up to its first number: `model.layers.3` of `model.layers.3.mlp.down_proj`."""
    match = re.match(r"((?:.*?\.)?\d+)(?:\.|$)", path)
    return match.group(1) if match else ""


def split(path: str) -> tuple[str, str]:
    owner, _, name = path.rpartition(".")
    return owner, name


def weight_sites(
    graph: Graph,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, str],
    aside: Mapping[str, tuple[str, str]],
) -> list[WeightSite]:
    """One site per weight in order of first use, tables last; `aside` gives role and reason of those not default."""
    names: dict[int, list[str]] = defaultdict(list)
    for path, parameter in parameters.items():
        names[id(parameter)].append(path)
    sites = []
    for weight, uses in _groups(graph):
        if weight not in parameters or obstacle(parameters[weight], uses):
            continue
        paths = names[id(parameters[weight])]
        owners = {use.module for use in uses}
        acting = [p for p in paths if split(p)[0] in owners] or [weight]
        # a parameter under several paths is one site, but a table and the head that is tied to it act apart
        met = {*graph.uses_of.get(weight, []), *graph.lookups_of.get(weight, [])}
        apart = {use.module for use in met} - owners
        aliases = tuple(p for p in paths if p != acting[0] and split(p)[0] not in apart)
        role, reason = ("embedding", TABLE) if uses[0].lookup else aside.get(weight, (roles.get(weight, "other"), ""))
        layout = _layout(modules, parameters[weight], acting[0], uses)
        site = WeightSite(acting[0], *split(acting[0]), role, **layout, aliases=aliases, rows=_rows(uses))
        access: Literal["call", "read"] = "call" if _called(graph, modules, site, uses) else "read"
        sites.append(replace(site, access=access, block=block_of(site.path), default=not reason, reason=reason))
    return sites


def _groups(graph: Graph) -> Iterator[tuple[str, list[Use]]]:
    """Each weight with its products, then each table with its lookups: a tied one is met twice, at its two owners.

    One whose owner both looks up and multiplies has no two places to act at, and is met once.
    """
    for weight, uses in graph.uses_of.items():
        lookups = graph.lookups_of.get(weight, [])
        yield weight, uses + [each for each in lookups if each.module in {use.module for use in uses}]
    for weight, lookups in graph.lookups_of.items():
        apart = [each for each in lookups if each.module not in {use.module for use in graph.uses_of.get(weight, [])}]
        if apart:
            yield weight, apart


def obstacle(parameter: nn.Parameter, uses: list[Use]) -> str:
    """Why a used weight is no site, or nothing."""
    kinds = {use.op for use in uses if not use.linear}
    if any(op.startswith("conv_transpose") for op in kinds):
        return "a transposed convolution, whose weight is no matrix over its outputs"
    if kinds and len({use.op for use in uses}) > 1:
        return "used as a convolution's kernel and in another way"
    if any(use.lookup and not use.whole for use in uses):
        return "a table that is changed before it is looked up in"
    if (
        len(shape_of(parameter)) > 2
        and not kinds
        and _experts(parameter, uses) is None
        and _folded_inner(parameter, uses) is None
    ):
        return "multiplied in a layout that is neither a matrix nor a stack of experts"
    return ""


def _experts(parameter: nn.Parameter, uses: list[Use]) -> int | None:
    """The number of matrices in a stack of them, each multiplied by itself."""
    stacked = len(shape_of(parameter)) == 3 and all(use.linear and use.inner is not None for use in uses)
    return shape_of(parameter)[0] if stacked else None


def _folded_inner(parameter: nn.Parameter, uses: list[Use]) -> int | None:
    """-2 where products sum over the first axis alone, -1 where they sum over all the others; None: neither.

    The shapes of an einsum tell: `h` of `hnd` against `ibh`, or `nd` of `hnd` against `ibnd`.
    """
    first, rest = shape_of(parameter)[0], shape_of(parameter)[1:]
    found = set()
    for use in uses:
        x, y = use.x.shape, use.out.shape
        if use.op == "einsum" and x[-1:] == (first,) and y[-len(rest) :] == rest:
            found.add(-2)
        elif use.op == "einsum" and x[-len(rest) :] == rest and y[-1:] == (first,):
            found.add(-1)
        else:
            return None
    return found.pop() if len(found) == 1 else None


def _layout(modules: Mapping[str, nn.Module], parameter: nn.Parameter, path: str, uses: list[Use]) -> dict[str, Any]:
    """How the stored parameter is seen as `(n_out, n_in)`, or as a stack of such."""
    use, experts = uses[0], _experts(parameter, uses)
    rows, columns = matrix(parameter)
    folded: tuple[int, ...] = ()
    if len(shape_of(parameter)) > 2 and experts is None:
        folded = shape_of(parameter)[1:]
        rows, columns = shape_of(parameter)[0], prod(folded)
    if use.lookup:
        inner: int | None = -2
    elif use.linear:
        inner = _folded_inner(parameter, uses) if folded else use.inner
    else:
        inner = -1
    if inner is None:
        inner = -1 if columns == use.x.shape[-1] else -2
    n_out, n_in = (rows, columns) if inner == -1 else (columns, rows)
    return {"n_in": n_in, "n_out": n_out, "experts": experts, "transposed": inner == -2, "folded": folded}


def _called(graph: Graph, modules: Mapping[str, nn.Module], site: WeightSite, uses: list[Use]) -> bool:
    """Whether calling the owner is the product and nothing else, and nobody goes past the call."""
    owners = {site.owner, *(split(alias)[0] for alias in site.aliases)}
    plain = all(
        use.linear and not use.lookup and use.module in owners and _plain(graph, modules, use, site.n_in, site.n_out)
        for use in uses
    )
    return site.experts is None and not site.folded and plain and not read_by_parent(modules, site.owner)


def _rows(uses: list[Use]) -> Rows:
    """What the probe saw, or else whether tokens were picked by index on the way, as they are for an expert."""
    found = {use.rows for use in uses}
    if len(found) == 1 and NOWHERE not in found:
        return uses[0].rows
    return Rows("routed") if all(_picked(use.x) for use in uses) else NOWHERE


def _picked(value: Value) -> bool:
    """Whether `value` was made by indexing with a computed index, since rows could last be followed."""
    todo, seen = [value], set[int]()
    while todo:
        step = todo.pop()
        if step.index in seen or (step.use is not None and step.use.rows != NOWHERE):
            continue
        seen.add(step.index)
        if step.op in PICKS and any(not parent.floating for parent in step.parents):
            return True
        todo.extend(step.active)
    return False


def matrix(parameter: nn.Parameter) -> tuple[int, int]:
    """The last two dimensions of a weight, `(rows, columns)`."""
    rows, columns = shape_of(parameter)[-2:]
    return rows, columns


def _plain(graph: Graph, modules: Mapping[str, nn.Module], use: Use, n_in: int, n_out: int) -> bool:
    """Whether the call in which the use happens computes `x @ w.T + bias` and nothing else."""
    if type(modules[use.module]).forward is nn.Linear.forward:
        return True
    calls = [call for call in graph.calls_of[use.module] if call.holds(use.index)]
    if len(calls) != 1 or set(calls[0].outputs) != {None} or 0 not in calls[0].inputs:
        return False
    x, y = calls[0].inputs[0], calls[0].outputs[None]
    fits = x.shape[-1:] == (n_in,) and y.shape[-1:] == (n_out,)
    return fits and _same_but_for_shape(y, use.out) and _same_but_for_shape(use.x, x)


def _same_but_for_shape(value: Value, source: Value) -> bool:
    while value is not source:
        if value.use is not None or len(value.active) != 1 or value.op not in VIEWS | SUMS:
            return False
        if value.op in SUMS and not all(p.weights for p in value.parents if p is not value.active[0]):
            return False
        value = value.active[0]
    return True


def read_by_parent(modules: Mapping[str, nn.Module], owner: str) -> bool:
    """Whether the parent's source reads `self.<owner>.weight`, as fused kernels do on a path the probe did not take."""
    path, name = split(owner)
    parent = modules.get(path)
    if parent is None or not name.isidentifier():
        return False
    classes: list[Any] = [cls for cls in type(parent).__mro__ if issubclass(cls, nn.Module)]
    return any(name in _weights_read(cls) for cls in classes)


@lru_cache(maxsize=4096)
def _weights_read(cls: type) -> frozenset[str]:
    if cls.__module__.startswith("torch."):
        return frozenset()
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # classes made at run time have no source
        return frozenset()
    source = re.sub(r"isinstance\([^)]*\)", "", source)
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data|to\b))", source))
