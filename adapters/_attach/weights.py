"""Reads a base weight in the contract's orientation, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from adapters._coded import decoded, is_coded
from adapters._contract import Method, Site, WeightMethod, WeightSite
from adapters._errors import AdapterError
from adapters._fourbit import shape_of
from adapters._layers import is_conv1d


@dataclass(frozen=True)
class BaseWeight:
    """The weight handle that methods receive: nothing is dequantised or copied before `dense` is called."""

    owner: nn.Module
    parameter: str
    shape: tuple[int, ...]
    stored_transposed: bool
    folded: tuple[int, ...] = ()  # the stored axes that are seen as one
    added: tuple[str, ...] = ()  # the owner's parameters that it adds to the product

    @property
    def stored(self) -> nn.Parameter:
        found = self.owner._parameters[self.parameter]
        assert found is not None
        return found

    @property
    def transposed(self) -> bool:
        # a Conv1D that was quantised holds its weight as (n_out, n_in); stacks of experts stay as they are
        turned = is_coded(self.stored) and len(shape_of(self.stored)) == 2
        return self.stored_transposed and not turned

    def dense(self) -> Tensor:
        stored = self.stored
        if stored.is_meta:
            raise AdapterError(
                f"{self.parameter} of a {type(self.owner).__name__} is offloaded, and this method reads it outside of "
                "the layer's own forward: load the base without offloading."
            )
        return self.seen(decoded(self.owner, stored) if is_coded(stored) else stored)

    def seen(self, stored: Tensor) -> Tensor:
        """A tensor in the shape of the stored parameter, in the contract's orientation."""
        matrix = stored.flatten(1) if self.folded else stored
        return matrix.mT if self.transposed else matrix

    def as_stored(self, w: Tensor) -> Tensor:
        """The inverse of `seen`."""
        matrix = w.mT if self.transposed else w
        return matrix.reshape(-1, *self.folded) if self.folded else matrix

    def bias(self) -> Tensor | None:
        held = self.biases()
        return sum(held[1:], start=held[0]) if held else None

    def biases(self) -> list[Tensor]:
        """The parameters whose sum is the bias: one of them, but for layers that few would write."""
        return [cast(Tensor, self.owner._parameters[name]) for name in self.added]


def base_weight(model: nn.Module, site: WeightSite) -> BaseWeight:
    """The handle of a site's weight."""
    owner = model.get_submodule(site.owner)
    added = added_by(owner, site) if site.access == "call" else ()
    return BaseWeight(owner, site.parameter, site.shape, _transposed(owner, site), site.folded, added)


def _transposed(owner: nn.Module, site: WeightSite) -> bool:
    """How the layer here stores its weight: a Conv1D's is turned where it was quantised, and the site may be recorded
    of the one or of the other.
    """
    plain = site.access == "call" and site.experts is None and not site.folded
    known = plain and (isinstance(owner, nn.Linear) or is_conv1d(owner))
    return is_conv1d(owner) if known else site.transposed


def added_by(owner: nn.Module, site: WeightSite) -> tuple[str, ...]:
    """What a called layer adds to its product, whatever it is called: the layer computes with nothing else."""
    held = {name: p.shape for name, p in owner._parameters.items() if p is not None and name != site.parameter}
    return tuple(name for name, shape in held.items() if shape == (site.n_out,))


def by_site(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors keyed `f"{path}:{name}"` as what each path has."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(":")
        found.setdefault(path, {})[name] = tensor
    return found


def bias_notes(model: nn.Module, method: Method, sites: Iterable[Site], tensors: Mapping[str, Tensor]) -> list[str]:
    """What a report says of layers that have no bias, and get one while the adapter acts."""
    if not isinstance(method, WeightMethod):
        return []
    given = by_site(tensors)
    called = [site for site in sites if isinstance(site, WeightSite) and site.access == "call"]
    without = [
        site.owner
        for site in called
        if not added_by(model.get_submodule(site.owner), site)
        and method.at(site).offset(None, given[site.path]) is not None
    ]
    if not without:
        return []
    return [f"merging will be refused: {len(without)} layers have no bias to merge one into, such as {without[0]}"]
