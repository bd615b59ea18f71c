"""Where a fusion acts, and what becomes of its parts when it is attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from adapters._attach.install import set_trainable
from adapters._attach.state import Adapter, adapters_of
from adapters._contract import FusionMethod, Method, Site, StreamMethod, StreamSite
from adapters._errors import AdapterError, nearest

Targets = str | Iterable[str] | Callable[[Site], bool]


def where_its_parts_act(model: nn.Module, method: Method, targets: Targets | None) -> Targets | None:
    """The targets given or, for a fusion, every site of its parts.

    Raises:
        AdapterError: a part is not attached, or changes no streams.
    """
    if not isinstance(method, FusionMethod):
        return targets
    paths = {site.path for part in _parts(model, method) for site in part.sites}
    return targets if targets is not None else lambda site: isinstance(site, StreamSite) and site.path in paths


def freeze_parts(model: nn.Module, method: Method) -> list[str]:
    """Only the fusion trains from now on: what was frozen for it, as lines of a report."""
    parts = _parts(model, method) if isinstance(method, FusionMethod) else []
    trained = [part.name for part in parts if part.trainable]
    for name in trained:
        set_trainable(model, name, False)
    return [f"{name!r}, a part of the fusion, is frozen now" for name in trained]


def _parts(model: nn.Module, method: FusionMethod) -> list[Adapter]:
    attached, found = adapters_of(model), []
    for name in method.parts:
        if name not in attached:
            raise AdapterError(f"no adapter {name!r} is attached to be fused{nearest(name, attached)}")
        adapter = attached[name]
        if not isinstance(adapter.method, StreamMethod) or isinstance(adapter.method, FusionMethod):
            raise AdapterError(
                f"{name!r} is {adapter.method.name}, and a fusion attends over what adapters make of streams."
            )
        found.append(adapter)
    return found
