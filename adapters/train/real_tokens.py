"""Padded batches computed on their real tokens alone, in whatever script trains the model.

From the first layer to the last, the hidden states (rows, tokens, width) of a batch are gathered to (1, real tokens,
width), so that linear layers, norms, experts and adapters see no padding: unpadding (Zeng et al., 2022, arXiv
2208.08124). Only attention is given the rows with their padding again, under the mask that the model made for them, so
that causality, windows, biases and prefixes are what they were; what it returns is gathered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach.acting import Chain, Fused, Mean, Node
from adapters._attach.signature import INPUTS, parameters_of
from adapters._attach.state import Adapter, State, selection, state_of
from adapters._attach.virtual import entry_of_layers, with_output
from adapters._contract import Key, LayerSite
from adapters._dispatch import OPERANDS, Attention, wrap_while
from adapters._trainers.trainer import attached_within

KEY = "real_tokens"  # the argument that leads from the embeddings to attention: checkpoints keep it with the others
MOST = 0.95  # share of real tokens in a batch up to which gathering them pays
_WHOLE = ("output_hidden_states", "output_attentions", "output_router_logits")  # what shows the layers' own shapes


@dataclass(frozen=True, eq=False)
class RealTokens:
    """Where the tokens of a batch of (rows, tokens) are that its mask does not hide: `index` (count,) into them all."""

    rows: int
    tokens: int
    index: Tensor

    def gathered(self, x: Tensor) -> Tensor:
        """(rows or 1, tokens, ...) to (1, count, ...)."""
        index = self.index.to(x.device)
        if x.shape[0] == 1 < self.rows:
            return x[0].index_select(0, index % self.tokens)[None]
        made: Tensor = _Gathered.apply(x.flatten(0, 1), index)  # type: ignore[no-untyped-call]
        return made[None]

    def spread(self, x: Tensor) -> Tensor:
        """(1, count, ...) to (rows, tokens, ...), 0 where there is padding."""
        made: Tensor = _Spread.apply(x[0], self.index.to(x.device), self.rows * self.tokens)  # type: ignore[no-untyped-call]
        return made.view(self.rows, self.tokens, *x.shape[2:])

    def by_row(self, x: Any) -> Tensor:
        """Queries, keys or values (1, heads, count, dim) as (rows, heads, tokens, dim); those of others as they are."""
        ours = x.shape[0] == 1 and x.shape[2] == self.index.numel()
        return self._filled(x.transpose(1, 2)).transpose(1, 2) if ours else x

    def _filled(self, x: Tensor) -> Tensor:
        """(1, count, ...) to (rows, tokens, ...), some token standing where there is padding: no token looks there."""
        made: Tensor = _Filled.apply(x[0], self.index.to(x.device), self.nearest.to(x.device))  # type: ignore[no-untyped-call]
        return made.view(self.rows, self.tokens, *x.shape[2:])

    @cached_property
    def nearest(self) -> Tensor:
        """(rows * tokens,): which of the real tokens stands at a place, or before it where there is padding."""
        real = torch.zeros(self.rows * self.tokens, dtype=torch.long, device=self.index.device)
        return real.index_fill_(0, self.index, 1).cumsum(0).sub_(1).clamp_(min=0)

    def argument(self, name: str, x: Any) -> Any:
        """A layer's argument with its real tokens alone, if it has a place for each token, as positions have."""
        if isinstance(x, tuple):
            return tuple(self.argument(name, each) for each in x)
        per_token = isinstance(x, Tensor) and x.dim() in (2, 3) and x.shape[1] == self.tokens
        of_others = "mask" in name or "encoder" in name  # whose places are others, though there may be as many
        if not per_token or x.shape[0] not in (1, self.rows) or of_others:
            return x
        return self.gathered(x)


class _Gathered(torch.autograd.Function):
    """Distinct rows of x, whose gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.size = index, x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(dy, ctx.index, ctx.size), None  # type: ignore[no-untyped-call]


class _Filled(torch.autograd.Function):
    """Rows of x by `places`, of which those at `index` alone have a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.index = index
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Gathered.apply(dy.contiguous(), ctx.index), None, None  # type: ignore[no-untyped-call]


class _Spread(torch.autograd.Function):
    """The adjoint: rows of x at their places among `size`, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.index = index
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Gathered.apply(dy, ctx.index), None, None  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class Entry:
    """Before the module that is given the tokens: finds the real ones, and sends them along with the arguments."""

    root: nn.Module
    caches: bool  # it makes a cache unless told not to
    used: int = 0  # times that the last layer ran on real tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        given = dict(zip(parameters_of(module), args, strict=False)) | kwargs
        real = _real_tokens(given)
        if real is None or self._is_seen(module, given) or not _each_token_alone(self.root):
            return None
        wrap_while(module, KEY, _wrapper, outermost=True)
        if self.caches:
            given["use_cache"] = False
        return args[len(parameters_of(module)) :], {**given, KEY: real}

    def _is_seen(self, module: nn.Module, given: Mapping[str, Any]) -> bool:
        """Whether somebody asked for what the layers leave behind: states by layer, or a cache of keys and values."""
        config = getattr(module, "config", None)
        asked = [given[key] if given.get(key) is not None else getattr(config, key, False) for key in _WHOLE]
        default = self.caches and not module.training
        cache = default if given.get("use_cache") is None else given["use_cache"] and self.caches
        return any(asked) or bool(cache) or given.get("past_key_values") is not None


def _real_tokens(given: Mapping[str, Any]) -> RealTokens | None:
    """Those of a batch whose rows are padded on the right: before a real token, padding may be asked to predict it."""
    mask = given.get("attention_mask")
    batch = next((given[name] for name in INPUTS if isinstance(given.get(name), Tensor)), None)
    if batch is None or not isinstance(mask, Tensor) or mask.shape != batch.shape[:2]:
        return None
    (rows, tokens), index = mask.shape, mask.flatten().nonzero().squeeze(1)
    pays = 0 < index.numel() <= MOST * mask.numel()
    on_the_right = pays and not bool((mask[:, 1:] > mask[:, :-1]).any())
    return RealTokens(rows, tokens, index) if on_the_right else None


def _each_token_alone(root: nn.Module) -> bool:
    """Whether what acts does the same to every row and token, outside of attention."""
    attached = attached_within(root)
    state: State | None = None if attached is None else state_of(attached)
    if state is None:
        return True
    acting = selection(state)
    virtual = any(adapter.traits.layers for adapter in acting)
    return _alike(acting.node) and not acting.separately and not virtual


def _alike(node: Node) -> bool:
    if isinstance(node, Chain | Mean | Fused):
        return all(map(_alike, node.parts))
    return node is None or isinstance(node, Adapter)


@dataclass(frozen=True, eq=False)
class _Before:
    """Before a layer: its arguments are given for real tokens alone, as the hidden states are from the second on."""

    site: LayerSite
    first: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        real = kwargs.get(KEY)
        if real is None:
            return None
        names = parameters_of(module)
        made = [self._argument(real, i, name, x) for i, (name, x) in enumerate(zip(names, args, strict=False))]
        by_name = {name: self._argument(real, name, name, x) for name, x in kwargs.items()}
        return (*made, *args[len(made) :]), by_name

    def _argument(self, real: RealTokens, at: Key, name: str, x: Any) -> Any:
        return x if at == self.site.input and not self.first else real.argument(name, x)


@dataclass(frozen=True, eq=False)
class _After:
    """After the last layer: its output has the batch's shape again."""

    site: LayerSite
    entry: Entry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        real = kwargs.get(KEY)
        if real is None:
            return None
        self.entry.used += 1
        return with_output(result, self.site, real.spread)


def _wrapper(attend: Attention, name: str) -> Attention:
    def attention(module: nn.Module, *args: Any, **kw: Any) -> Any:
        real = kw.pop(KEY, None)
        if real is None:
            return attend(module, *args, **kw)
        given = dict(zip(OPERANDS, args, strict=False)) | {key: kw.pop(key) for key in OPERANDS if key in kw}
        *three, mask = map(given.get, OPERANDS)
        out, *weights = attend(module, *map(real.by_row, three), mask, *args[len(OPERANDS) :], **kw)
        return real.gathered(out), *weights  # (rows, tokens, heads, dim)

    return attention


def install(root: nn.Module, sites: tuple[LayerSite, ...], caches: bool) -> tuple[Entry, list[Any]]:
    """Puts the hooks in place, and returns what counts forwards, and the handles."""
    entry = root.get_submodule(entry_of_layers(root, sites))
    at_entry = Entry(root, caches)
    handles = [entry.register_forward_pre_hook(at_entry, with_kwargs=True)]
    for site in sites:
        layer = root.get_submodule(site.path)
        handles.append(layer.register_forward_pre_hook(_Before(site, site is sites[0]), with_kwargs=True))
    last = root.get_submodule(sites[-1].path)
    handles.append(last.register_forward_hook(_After(sites[-1], at_entry), with_kwargs=True))
    return at_entry, handles
