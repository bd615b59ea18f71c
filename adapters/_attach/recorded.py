"""What a model computes at the places of a prefix: the keys and values of attentions, the states that enter layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from adapters._attach.injection import recording
from adapters._attach.inside import of_first_row, recording_written
from adapters._attach.state import NOBODY, State, holding, state_of
from adapters._contract import KeyValueSite, LayerSite, Site
from adapters._errors import AdapterError
from adapters._evaluating import evaluating

Recorded: TypeAlias = Mapping[str, tuple[Tensor, ...]]


def record(model: nn.Module, runs: nn.Module, sites: tuple[Site, ...], inputs: Mapping[str, Any]) -> Recorded:
    """What reaches each site while `runs`, a part of the model or all of it, runs on `inputs`."""
    paths = {id(model.get_submodule(site.path)): site.path for site in sites}
    heads = {site.path: site.heads for site in sites if isinstance(site, KeyValueSite)}
    own = {site.path: site for site in sites if isinstance(site, KeyValueSite) and site.product is not None}
    found: dict[str, tuple[Tensor, ...]] = {}

    def see(module: nn.Module, keys: Tensor, values: Tensor) -> None:
        path = paths.get(id(module))
        if path is not None:
            found.setdefault(path, tuple(of_first_row(x, heads[path]).float() for x in (keys, values)))

    layers = {site.path: site for site in sites if isinstance(site, LayerSite)}
    with (
        evaluating(model),
        holding(state_of(model) or State(), NOBODY),
        recording(see),
        recording_written(model, own, see),
        _entering(model, layers, found),
        _NoNegativeLookup(),
    ):
        runs(**inputs)
    missing = [site.path for site in sites if site.path not in found]
    if missing:
        raise AdapterError(f"nothing reached {missing[0]} when the model was run to see what a prefix starts as.")
    return found


@contextmanager
def _entering(
    model: nn.Module, layers: Mapping[str, LayerSite], found: dict[str, tuple[Tensor, ...]]
) -> Iterator[None]:
    """Notes the hidden states of the first row that enter each layer: (tokens, width)."""

    def see(site: LayerSite) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[site.input] if isinstance(site.input, int) else kwargs[str(site.input)]
            found.setdefault(site.path, (x.detach().select(1 - site.axis, 0).float(),))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(see(site), with_kwargs=True)
        for path, site in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def of_length(recorded: Recorded, length: int) -> tuple[Recorded, bool]:
    """The first `length` positions; those of an attention that has fewer, as one over windows, are repeated."""
    cycled = any(x.shape[-2] < length for parts in recorded.values() for x in parts)
    index = torch.arange(length)
    return {
        path: tuple(x[..., index.to(x.device) % x.shape[-2], :] for x in parts) for path, parts in recorded.items()
    }, cycled


class NegativePosition(Exception):
    """Why a model cannot run at negative positions."""


class _NoNegativeLookup(TorchFunctionMode):
    """Raises before a table is indexed with a negative number: on a GPU the lookup itself would end the process."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKUPS:
            # what is looked up may be negative itself; only indices may not. F.embedding takes the index first
            for index in _integers((args[:1] if func is F.embedding else args[1:], tuple(kwargs.values()))):
                if index.numel() and bool((index < 0).any()):
                    raise NegativePosition("this model embeds positions")
        return func(*args, **kwargs)


_LOOKUPS = (
    F.embedding,
    torch.embedding,
    torch.Tensor.__getitem__,
    torch.index_select,
    torch.Tensor.index_select,
    torch.gather,
    torch.Tensor.gather,
)


def _integers(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)]
