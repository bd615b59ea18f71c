"""The places where an adapter trains: its tensors at one site, or its copy of a head, and the module they are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from adapters._attach import Adapter, adapters_of, state_of, tensors_of, unwrapped
from adapters._attach.container import CHILD
from adapters._attach.entries import entry_of, submodule
from adapters._attach.weights import by_site
from adapters._contract import Site, WeightSite
from adapters._errors import AdapterError, nearest


@dataclass(frozen=True, eq=False)
class Place:
    """One adapter's tensors at one site, `site` None for a head. `entry` is the module that holds and uses them."""

    adapter: Adapter
    path: str
    site: Site | None
    tensors: Mapping[str, Tensor]
    entry: nn.Module

    @property
    def experts(self) -> int:
        """How many experts are stacked in the first dimension of every tensor; 1 where none are."""
        return (self.site.experts or 1) if isinstance(self.site, WeightSite) else 1

    @property
    def routed(self) -> bool:
        """Whether tokens are picked for this place, so that a batch may leave it out."""
        return self.site is not None and self.site.rows.layout == "routed"

    @property
    def trains(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors.values())


def places(model: nn.Module, adapter: Adapter) -> tuple[Place, ...]:
    """Every site and head of an adapter, in the order of its sites."""
    model = unwrapped(model)
    tensors = by_site(tensors_of(model, adapter.name))
    at_sites = [Place(adapter, s.path, s, tensors[s.path], entry_of(model, adapter, s)) for s in adapter.sites]
    return (
        *at_sites,
        *(Place(adapter, path, None, tensors[path], _replica(model, adapter, path)) for path in adapter.head),
    )


def _replica(model: nn.Module, adapter: Adapter, path: str) -> nn.Module:
    held = submodule(model, path)._modules[CHILD]
    assert held is not None, "an adapter's head is beside the base's"
    return held.get_submodule(adapter.slot)


def named(model: nn.Module, name: str | None) -> tuple[Adapter, ...]:
    """The adapter `name`, or all that are attached.

    Raises:
        AdapterError: there is no such adapter.
    """
    attached = adapters_of(model)
    if name is not None and name not in attached:
        raise AdapterError(f"no adapter {name!r} on this model{nearest(name, attached)}; attached: {list(attached)}.")
    return tuple(attached.values()) if name is None else (attached[name],)


def trained(model: nn.Module, name: str | None = None) -> tuple[Place, ...]:
    """The places that training changes: of the adapter `name`, or of every attached one, where a tensor trains."""
    found = [place for adapter in named(model, name) for place in places(model, adapter)]
    return tuple(place for place in found if place.trains)


def acting(model: nn.Module) -> tuple[Adapter, ...]:
    """The adapters that a forward would use now."""
    state = state_of(model)
    return state.active if state is not None else ()
