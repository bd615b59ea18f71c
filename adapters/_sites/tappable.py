"""Attentions in a model's own code as sites of a prefix: where they are, and whether one can be carried through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from adapters._contract import KeyValueSite
from adapters._sites.aside import NO_GRADIENT
from adapters._sites.graph import Graph, WrittenOut
from adapters._sites.probe import TOKENS
from adapters._sites.weights import block_of
from adapters._sites.written import Unfollowed, Written

Forward: TypeAlias = Callable[..., Any]
_SEVERAL = "it attends {} times in one forward, and a prefix would not know for which it is"
_UNFOLLOWED = "its attention is written in a way through which no prefix can be carried: {}"


def tappable(graph: Graph, trained: set[int], known: set[str]) -> list[KeyValueSite]:
    """A site for each module with softmax attentions of its own, default where it is one; `tried` adds the shapes."""
    found: dict[tuple[str, int], list[KeyValueSite]] = {}
    for each in graph.written:
        call = next((c for c in graph.enclosing(each.scores.index) if c.holds(each.out.index)), None)
        if not each.softmax or call is None or call.path in known or _at_every_token(each):
            continue
        number = sum(call.start <= index < each.scores.index for index in graph.pairs)
        reason = "" if each.query.index in trained else NO_GRADIENT
        site = KeyValueSite(
            call.path, 0, 0, 0, block=block_of(call.path), default=not reason, reason=reason, product=number
        )
        found.setdefault((call.path, call.start), []).append(site)
    several = _SEVERAL.format
    made = [
        sites[0] if len(sites) == 1 else replace(sites[0], default=False, reason=several(len(sites)), product=None)
        for sites in found.values()
    ]
    return list({site.path: site for site in made}.values())


def _at_every_token(each: WrittenOut) -> bool:
    """Whether each token attends by itself, to what earlier layers made of it: tokens are rows, and do not meet."""
    (*lead, queries, _), (*others, first, last) = each.query.shape, each.key.shape  # keys may be transposed
    apart = TOKENS in lead and TOKENS in others and TOKENS not in (queries, first, last)
    return apart and (queries == 1 or queries not in (first, last))


@contextmanager
def running_as(
    modules: Mapping[str, nn.Module], paths: Iterable[str], wrap: Callable[[str, Forward], Forward]
) -> Iterator[None]:
    """Modules whose forward is `wrap(path, forward)` meanwhile."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for path in paths:
            module = modules[path]
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = wrap(path, module.forward)
        yield
    finally:
        for module, own in reversed(before):
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


class _Failed(Exception):
    """An attention through which no prefix can be carried: its path, and why."""


def tried(
    sites: list[KeyValueSite], modules: Mapping[str, nn.Module], run: Callable[[], Any], rows: int
) -> list[KeyValueSite]:
    """The sites with their shapes, after one forward with a prefix in all of them; those that fail are not default.

    A forward that failed may have left its mark on what layers hand on, such as a cache: the model runs anew without.
    """
    known = {site.path: site for site in sites}
    pending = {site.path for site in sites if site.product is not None}

    def wrap(path: str, inner: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            trial = _Trial(_sequences(args, kwargs, rows))
            mode = _Tried(known[path].product or 0, trial)
            try:
                with mode:
                    result = inner(*args, **kwargs)
            except (Unfollowed, RuntimeError, IndexError) as error:
                raise _Failed(path, str(error)) from error
            if not mode.done:
                raise _Failed(path, "its weights meet no values")
            known[path] = replace(known[path], **trial.shapes())
            return result

        return forward

    while pending:
        try:
            with running_as(modules, pending, wrap), torch.no_grad():
                run()
            break
        except _Failed as failed:
            path, why = failed.args
            known[path] = replace(known[path], default=False, reason=_UNFOLLOWED.format(why))
            pending.remove(path)
    return list(known.values())


@dataclass
class _Trial:
    """A prefix of two of the attention's own keys and values, and what was seen on the way."""

    sequences: int
    heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    causal: bool = False

    def keys(self, k: Tensor) -> Tensor:
        lead = k.shape[:-2]
        self.heads, self.k_dim = (lead[-1] if len(lead) > 1 else lead[0] // self.sequences), k.shape[-1]
        return 0.5 * k[..., :2, :]

    def values(self, v: Tensor) -> Tensor:
        self.v_dim = v.shape[-1]
        return 0.5 * v[..., :2, :]

    def shapes(self) -> dict[str, Any]:
        return {"heads": self.heads, "k_dim": self.k_dim, "v_dim": self.v_dim, "causal": self.causal}


class _Tried(Written):
    prefix: _Trial

    def weights(self, w: Tensor) -> None:
        self.prefix.causal = w.shape[-1] == w.shape[-2] and not bool(w.triu(1).any())


def _sequences(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> int:
    """How many sequences a module was given: rows, or as many times more as there are choices or windows.

    Its hidden states are (sequences, tokens, width) or (tokens, sequences, width).
    """
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3:
            if rows in x.shape[:2] or not rows:
                return rows or x.shape[0]
            return next((size for size in x.shape[:2] if size % rows == 0), x.shape[0])
    return rows or 1
