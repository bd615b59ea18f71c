"""What a selection means, by its written definition: a plain base with its weights changed, its streams passed through
the methods' formulas, and one prefix of everything that is prepended. Nothing here asks the engine to compose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import adapters
from adapters._attach import base_weight, install, tensors_of
from adapters._contract import FusionMethod, KeyValueMethod, Method, StreamMethod, StreamSite, WeightMethod, WeightSite

Selection = Any


@dataclass(frozen=True)
class Part:
    """One adapter, apart from any model: its method, its sites by path, its tensors by path."""

    method: Method
    sites: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    head: dict[str, Tensor]


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The attached adapters of a model, copied."""
    found = {}
    for name, adapter in adapters.adapters_of(model).items():
        sites = {site.path: site for site in adapter.sites}
        tensors: dict[str, dict[str, Tensor]] = {path: {} for path in sites}
        head = {}
        for key, tensor in tensors_of(model, name).items():
            path, _, own = key.rpartition(":")
            if own.startswith("head."):
                head[f"{path}.{own.removeprefix('head.')}"] = tensor.detach().clone()
            else:
                tensors[path][own] = tensor.detach().clone()
        found[name] = Part(adapter.method, sites, tensors, head)
    return found


def output(plain: nn.Module, selection: Selection, parts: Mapping[str, Part], run: Callable[[], Tensor]) -> Tensor:
    """What `run` returns of the plain base under a selection, rows first; `run` computes the whole batch."""
    if isinstance(selection, list):
        rows = [output(plain, each, parts, run)[row] for row, each in enumerate(selection)]
        return torch.stack(rows)
    if _kind(selection) == "Parallel":
        return torch.cat([output(plain, each, parts, run) for each in selection.parts])
    with torch.no_grad(), applied(plain, selection, parts):
        return run().clone()


@contextmanager
def applied(plain: nn.Module, selection: Selection, parts: Mapping[str, Part]) -> Iterator[None]:
    """The plain base made into what `selection` means, for as long as this lasts."""
    used = [parts[name] for name in names(selection)]
    with ExitStack() as undo:
        for path, head in {path: t for part in used for path, t in part.head.items()}.items():
            undo.enter_context(_written(plain, path, head))  # of several heads, the last part's
        for path in _paths(used, WeightMethod):
            undo.enter_context(_weight(plain, path, selection, parts))
        for path in _paths(used, StreamMethod):
            undo.enter_context(_stream(plain, path, selection, parts))
        if _paths(used, KeyValueMethod):
            undo.enter_context(_prefix(plain, selection, parts))
        yield


def names(selection: Selection) -> list[str]:
    """The adapters that a selection names, each as often as it is named."""
    if selection is None or isinstance(selection, str):
        return [] if selection is None else [selection]
    return [name for part in selection.parts for name in names(part)]


def _kind(selection: Selection) -> str:
    return type(selection).__name__


def _paths(parts: list[Part], kind: type[Method]) -> list[str]:
    """The sites of adapters of this kind, each once, in order."""
    return list(dict.fromkeys(path for part in parts if isinstance(part.method, kind) for path in part.sites))


def _site(path: str, kind: type[Method], parts: Mapping[str, Part]) -> Any:
    return next(p.sites[path] for p in parts.values() if isinstance(p.method, kind) and path in p.sites)


# -- by tokens


def _cuts(selection: Selection) -> list[int]:
    """Where the selection changes along the tokens."""
    if selection is None or isinstance(selection, str):
        return []
    own = list(selection.at) if _kind(selection) == "Split" else []
    return sorted({*own, *(cut for part in selection.parts for cut in _cuts(part))})


def at_token(selection: Selection, token: int) -> Selection:
    """What acts on one token: every Split replaced by the part that is in force there."""
    if selection is None or isinstance(selection, str):
        return selection
    if _kind(selection) == "Split":
        return at_token(selection.parts[sum(token >= cut for cut in selection.at)], token)
    made = [at_token(part, token) for part in selection.parts]
    weights = {"weights": selection.weights} if _kind(selection) == "Average" else {}
    return type(selection)(*made, **weights)


def _by_tokens(selection: Selection, x: Tensor, make: Callable[[Selection, slice], Tensor]) -> Tensor:
    """`make` for each range of tokens, axis -2 of `x`, put together."""
    bounds = [0, *(cut for cut in _cuts(selection) if cut < x.shape[-2]), x.shape[-2]]
    pieces = [make(at_token(selection, a), slice(a, b)) for a, b in pairwise(bounds)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2)


# -- weights: W -> W', b -> b'


def weight(
    selection: Selection, site: WeightSite, w: Tensor, b: Tensor | None, parts: Mapping[str, Part]
) -> tuple[Tensor, Tensor | None]:
    if selection is None:
        return w, b
    if isinstance(selection, str):
        part = parts[selection]
        if site.path not in part.sites or not isinstance(part.method, WeightMethod):
            return w, b
        method, p = part.method.at(part.sites[site.path]), part.tensors[site.path]
        return method.weight(w, p), method.offset(b, p) if site.access == "call" else b
    made: list[tuple[Tensor, Tensor | None]] = []
    if _kind(selection) == "Stack":
        for each in selection.parts:
            w, b = weight(each, site, w, b, parts)
        return w, b
    made = [weight(each, site, w, b, parts) for each in selection.parts]
    biases = [bias for _, bias in made]
    new = sum((s * (changed - w) for s, (changed, _) in zip(selection.weights, made, strict=True)), start=w)
    if all(bias is None for bias in biases):
        return new, None
    zero = torch.zeros(site.n_out, dtype=w.dtype)
    old = zero if b is None else b
    shifts = [s * ((zero if bias is None else bias) - old) for s, bias in zip(selection.weights, biases, strict=True)]
    return new, sum(shifts, start=old)


@contextmanager
def _weight(plain: nn.Module, path: str, selection: Selection, parts: Mapping[str, Part]) -> Iterator[None]:
    """The weight changed in place, or its layer's output: for gradients, where tokens differ, for a first bias."""
    site = _site(path, WeightMethod, parts)
    handle, owner = base_weight(plain, site), plain.get_submodule(site.owner)
    w, b = handle.dense().detach(), handle.bias() if site.access == "call" else None
    b = None if b is None else b.detach()
    changed = [weight(at_token(selection, token), site, w, b, parts) for token in (0, *_cuts(selection))]
    called = site.access == "call" and torch.is_grad_enabled()  # so that gradients reach the parts' tensors
    if called or len(changed) > 1 or (b is None and changed[0][1] is not None):

        def call(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            x = args[0] if args[0].dim() > 1 else args[0][None]

            def piece(chosen: Selection, tokens: slice) -> Tensor:
                new, offset = weight(chosen, site, w, b, parts)
                product = x[..., tokens, :] @ new.mT
                return product if offset is None else product + offset

            return _by_tokens(selection, x, piece).view(y.shape)

        hook = owner.register_forward_hook(call)
        try:
            yield
        finally:
            hook.remove()
        return
    new = {site.parameter: handle.as_stored(changed[0][0])}
    if b is not None:
        rest = sum((other.detach() for other in handle.biases()[1:]), start=torch.zeros_like(b))
        new[handle.added[0]] = changed[0][1] - rest
    with ExitStack() as undo:
        for name, tensor in new.items():
            undo.enter_context(_written(plain, f"{site.owner}.{name}".removeprefix("."), tensor))
        yield


@contextmanager
def _written(plain: nn.Module, path: str, new: Tensor) -> Iterator[None]:
    """A parameter with other values."""
    parameter = plain.get_parameter(path)
    old = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.copy_(new)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(old)


# -- streams: y -> y'


def stream(selection: Selection, site: StreamSite, x: Tensor | None, y: Tensor, parts: Mapping[str, Part]) -> Tensor:
    if selection is None:
        return y
    if isinstance(selection, str):
        part = parts[selection]
        if site.path not in part.sites or not isinstance(part.method, StreamMethod):
            return y
        method = part.method.at(part.sites[site.path])
        p = {name: tensor.to(y.dtype) for name, tensor in part.tensors[site.path].items()}
        if isinstance(method, FusionMethod):
            return fusion(y, [stream(name, site, x, y, parts) for name in method.parts], p)
        return method.stream(x if method.reads_input() else None, y, p)
    if _kind(selection) == "Stack":
        for each in selection.parts:
            y = stream(each, site, x, y, parts)
        return y
    made = [stream(each, site, x, y, parts) for each in selection.parts]
    return sum((s * (new - y) for s, new in zip(selection.weights, made, strict=True)), start=y)


def fusion(y: Tensor, made: list[Tensor], p: Mapping[str, Tensor]) -> Tensor:
    """AdapterFusion (arXiv 2005.00247, section 3.2), part by part: softmax_i(Q y . K z_i) over V z_i."""
    query = y @ p["query"].T + p["query_bias"]
    scores = [(query * (z @ p["key"].T)).sum(-1, keepdim=True).exp() for z in made]
    return sum((s / sum(scores) * (z @ p["value"].T) for s, z in zip(scores, made, strict=True)), torch.zeros_like(y))


@contextmanager
def _stream(plain: nn.Module, path: str, selection: Selection, parts: Mapping[str, Part]) -> Iterator[None]:
    site: StreamSite = _site(path, StreamMethod, parts)
    module, hooks, seen = plain.get_submodule(site.path), [], {}
    if site.input is None and site.tap is not None:
        keep = lambda _, args, kwargs: seen.update(x=(*args, *kwargs.values())[0])  # noqa: E731
        hooks.append(plain.get_submodule(site.tap).register_forward_pre_hook(keep, with_kwargs=True))

    def call(_: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        y = (result if site.output is None else result[site.output]).movedim(site.axis, -1)
        x = seen.get("x")
        if site.input is not None:
            x = args[site.input] if isinstance(site.input, int) and site.input < len(args) else kwargs.get(site.input)
        if x is not None:
            x = x.movedim(site.input_axis, -1)
            x = x.reshape(y.shape) if x.numel() == y.numel() else None

        def piece(chosen: Selection, tokens: slice) -> Tensor:
            return stream(chosen, site, None if x is None else x[..., tokens, :], y[..., tokens, :], parts)

        changed = _by_tokens(selection, y, piece).movedim(-1, site.axis).contiguous()
        if site.output is None:
            return changed
        if not isinstance(result, tuple):
            result[site.output] = changed
            return result
        items = [changed if i == site.output else item for i, item in enumerate(result)]
        return type(result)(*items) if hasattr(result, "_fields") else tuple(items)

    hooks.append(module.register_forward_hook(call, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- prefixes: [P; k]


def prefix(selection: Selection, path: str, parts: Mapping[str, Part]) -> dict[str, Tensor] | None:
    """The tensors of one prefix adapter that means the same, at one site: tokens are their second axis from the end."""
    if selection is None:
        return None
    if isinstance(selection, str):
        part = parts[selection]
        return part.tensors.get(path) if isinstance(part.method, KeyValueMethod) else None
    made = [found for each in selection.parts if (found := prefix(each, path, parts)) is not None]
    if not made:
        return None
    if _kind(selection) == "Stack":
        return {key: torch.cat([each[key] for each in made], -2) for key in made[0]}
    assert len(made) == len(selection.parts), "an Average with prefixes averages nothing else"
    return {
        key: sum((s * each[key] for s, each in zip(selection.weights, made, strict=True)), torch.zeros(()))
        for key in made[0]
    }


@contextmanager
def _prefix(plain: nn.Module, selection: Selection, parts: Mapping[str, Part]) -> Iterator[None]:
    own = [name for name in names(selection) if isinstance(parts[name].method, KeyValueMethod)]
    one = parts[own[0]]
    tensors = {path: prefix(selection, path, parts) for path in one.sites}
    length = next(iter(next(iter(tensors.values())).values())).shape[-2]  # type: ignore[union-attr]
    given = {f"{path}:{name}": t for path, held in tensors.items() for name, t in held.items()}  # type: ignore[union-attr]
    install(plain, "by hand", replace(one.method, length=length), one.sites.values(), given)  # type: ignore[call-arg]
    try:
        yield
    finally:
        adapters.detach(plain, "by hand")
