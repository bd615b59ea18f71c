"""A prefix in attentions that a model writes out itself: a function mode around the module's call carries it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adapters._attach.injection import Recorder, acting_prefix
from adapters._contract import KeyValueSite
from adapters._errors import AdapterError
from adapters._sites import Unfollowed, Written, running_as

WRITTEN = "written:"  # the face; followed by the number of the module's product of queries and keys


class _Spread:
    """Keys and values (heads, length, dim), the same for every row, in the layout of the module's own."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def keys(self, k: Tensor) -> Tensor:
        return _spread(self._keys, k)

    def values(self, v: Tensor) -> Tensor:
        return _spread(self._values, v)


def _spread(prefix: Tensor, own: Tensor) -> Tensor:
    """(*lead, length, dim); lead is (..., heads), or one axis of rows and, within a row, heads."""
    lead, heads = own.shape[:-2], prefix.shape[0]
    if len(lead) == 1 and lead[0] % heads == 0:
        return prefix.repeat(lead[0] // heads, 1, 1)
    if lead[-1] == heads:
        return prefix.expand(*lead, *prefix.shape[1:])
    raise Unfollowed(f"keys of {tuple(own.shape)} for a prefix of {heads} heads")


def written_call(inner: Callable[..., Any], product: int) -> Callable[..., Any]:
    """The call of a module that writes its attention out, with the prefixes of the acting adapters before its own."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        prefix = acting_prefix(self)
        if prefix is None:
            return inner(self, *args, **kwargs)
        if prefix.visible is not None or prefix.keys.dim() != 3:
            raise AdapterError(_lost(self, "its rows have prefixes of their own"))
        mode = Written(product, _Spread(prefix.keys, prefix.values))
        try:
            with mode:
                result = inner(self, *args, **kwargs)
        except Unfollowed as error:
            raise AdapterError(_lost(self, str(error))) from error
        if not mode.done:
            raise AdapterError(_lost(self, "the prefix met no values"))
        return result

    return __call__


def _lost(module: nn.Module, why: str) -> str:
    return (
        f"this {type(module).__name__} computed its attention in another way than the probe saw, and the prefix could "
        f"not follow ({why}): attach with example= of the kind of inputs that you use, or with where='layers'."
    )


@contextmanager
def recording_written(model: nn.Module, sites: Mapping[str, KeyValueSite], see: Recorder) -> Iterator[None]:
    """Calls `see(module, keys, values)` at each of them: (rows, heads, tokens, dim), or with rows and heads as one."""
    modules = {path: model.get_submodule(path) for path in sites}

    def wrap(path: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            noted = _Noted()
            with Written(sites[path].product or 0, noted):
                result = inner(*args, **kwargs)
            if noted.k is not None and noted.v is not None:
                see(modules[path], noted.k, noted.v)
            return result

        return forward

    with running_as(modules, sites, wrap):
        yield


class _Noted:
    """A prefix of no length, which notes what it would stand before."""

    k: Tensor | None = None
    v: Tensor | None = None

    def keys(self, k: Tensor) -> Tensor:
        self.k = k.detach()
        return k.new_empty(*k.shape[:-2], 0, k.shape[-1])

    def values(self, v: Tensor) -> Tensor:
        self.v = v.detach()
        return v.new_empty(*v.shape[:-2], 0, v.shape[-1])


def of_first_row(x: Tensor, heads: int) -> Tensor:
    """(heads, tokens, dim) of the first of several rows; `x` is (rows, heads, tokens, dim), or has both as one axis."""
    return x[:heads] if x.dim() == 3 else x.flatten(0, -4)[0]
