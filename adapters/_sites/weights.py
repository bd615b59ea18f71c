"""Weight sites: how a weight is stored and reached, and whether it is adapted by default."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from adapters._contract import WeightSite
from adapters._sites.graph import Graph, Use, Value
from adapters._sites.operands import SUMS, VIEWS


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
    """One site per weight in order of first use; `aside` gives role and reason of those outside the default."""
    names: dict[int, list[str]] = defaultdict(list)
    for path, parameter in parameters.items():
        names[id(parameter)].append(path)
    sites = []
    for weight, uses in graph.uses_of.items():
        if weight not in parameters or obstacle(parameters[weight], uses):
            continue
        paths = names[id(parameters[weight])]
        called = [p for p in paths if split(p)[0] == uses[0].module]
        path = called[0] if called else weight
        aliases = tuple(p for p in paths if p != path)
        role, reason = aside.get(weight, (roles.get(weight, "other"), ""))
        sites.append(_site(graph, modules, parameters[weight], path, aliases, uses, role, reason))
    return sites


def obstacle(parameter: nn.Parameter, uses: list[Use]) -> str:
    """Why a used weight is no site, or nothing."""
    if not all(use.linear for use in uses):
        return "a convolution, which methods do not act on"
    if parameter.dim() > 3 or (parameter.dim() == 3 and any(use.inner is None for use in uses)):
        return "multiplied in a layout that is neither a matrix nor a stack of experts"
    return ""


def _site(
    graph: Graph,
    modules: Mapping[str, nn.Module],
    parameter: nn.Parameter,
    path: str,
    aliases: tuple[str, ...],
    uses: list[Use],
    role: str,
    reason: str,
) -> WeightSite:
    owner, name = split(path)
    rows, columns = matrix(modules[owner], parameter)
    inner = uses[0].inner if uses[0].inner is not None else (-1 if columns == uses[0].x.shape[-1] else -2)
    n_out, n_in = (rows, columns) if inner == -1 else (columns, rows)
    owners = {owner, *(split(alias)[0] for alias in aliases)}
    called = parameter.dim() == 2 and all(use.module in owners and _plain(graph, use, n_in, n_out) for use in uses)
    return WeightSite(
        path=path,
        owner=owner,
        parameter=name,
        role=role,
        n_in=n_in,
        n_out=n_out,
        experts=parameter.shape[0] if parameter.dim() == 3 else None,
        transposed=inner == -2,
        access="call" if called and not read_by_parent(modules, owner) else "read",
        block=block_of(path),
        default=not reason,
        reason=reason,
        aliases=aliases,
    )


def matrix(module: nn.Module, parameter: nn.Parameter) -> tuple[int, int]:
    """The last two dimensions of a weight, `(rows, columns)`; quantised ones are stored packed."""
    if hasattr(parameter, "quant_state"):
        return int(getattr(module, "out_features", 0)), int(getattr(module, "in_features", 0))
    return parameter.shape[-2], parameter.shape[-1]


def _plain(graph: Graph, use: Use, n_in: int, n_out: int) -> bool:
    """Whether the call in which the use happens computes `x @ w.T + bias` and nothing else."""
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
