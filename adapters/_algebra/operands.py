"""What the algebra works on: adapters as values, read from a model or from a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from adapters._attach import adapters_of, base_weight, state_of, tensors_of, unwrapped
from adapters._attach.weights import by_site
from adapters._contract import Factors, Method, Site, WeightMethod, WeightSite
from adapters._errors import AdapterError, nearest
from adapters._store.bundle import Bundle
from adapters._store.reading import read


@dataclass(frozen=True)
class Operand:
    """One adapter, what it is called in a report, and where its base's weights are, if anywhere."""

    label: str
    bundle: Bundle
    model: nn.Module | None = None

    @property
    def method(self) -> Method:
        return self.bundle.method

    @cached_property
    def sites(self) -> dict[str, Site]:
        return {site.path: site for site in self.bundle.sites}

    @cached_property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The method's own tensors at each site."""
        return by_site({key: tensor for key, tensor in self.bundle.tensors.items() if not _replaces(key)})

    @cached_property
    def replaced(self) -> dict[str, Tensor]:
        """What stands in for tensors of the base: heads, and the rows of tokens."""
        return {key: tensor for key, tensor in self.bundle.tensors.items() if _replaces(key)}


def attached(model: nn.Module, name: str) -> Operand:
    """An adapter of a model.

    Raises:
        AdapterError: there is none of that name.
    """
    known = adapters_of(model)
    if not isinstance(name, str) or name not in known:
        state = state_of(model)
        if state is not None and name in state.named:
            raise AdapterError(f"{name!r} is a composition, {state.named[name]!r}: name the adapters in it.")
        have = f"Attached: {', '.join(known)}." if known else "None is attached."
        raise AdapterError(f"no adapter {name!r} on this model{nearest(str(name), known)} {have}")
    found = known[name]
    tensors = {key: tensor.detach() for key, tensor in tensors_of(model, name).items()}
    bundle = Bundle(
        name,
        found.method,
        found.sites,
        tensors,
        found.head,
        facts=found.facts,
        labels=found.labels,
        tokens=found.tokens,
    )
    return Operand(name, bundle, unwrapped(model))


def stored(source: str | os.PathLike[str] | Bundle, model: nn.Module | None = None) -> Operand:
    """The adapter in a folder, every digest checked, or what `adapters.read` returned.

    Raises:
        DamagedAdapter, AdapterError: as `adapters.read`.
    """
    bundle = source if isinstance(source, Bundle) else read(source, model)
    label = os.path.basename(os.path.abspath(bundle.folder)) if bundle.folder else bundle.name
    return Operand(label, bundle, unwrapped(model) if model is not None else None)


def low_rank(operand: Operand, path: str) -> Factors | None:
    """The whole change at a site as a low-rank product, None where it is none."""
    method = operand.method.at(operand.sites[path])
    return method.factors(operand.parts[path]) if isinstance(method, WeightMethod) else None


def is_low_rank(operand: Operand) -> bool:
    """Whether every change that the adapter makes is a low-rank product."""
    return all(isinstance(site, WeightSite) for site in operand.bundle.sites) and all(
        low_rank(operand, path) is not None for path in operand.sites
    )


def dense_change(operand: Operand, path: str) -> Tensor:
    """W' - W in fp64, `(..., n_out, n_in)`, of any method that changes weights.

    Raises:
        AdapterError: the method does not, or its change depends on weights that are not at hand, or a bias changes.
    """
    site, method = operand.sites[path], operand.method.at(operand.sites[path])
    if not isinstance(method, WeightMethod) or not isinstance(site, WeightSite):
        raise AdapterError(f"{operand.label!r} is a {method.name}, which changes no weights.")
    if operand.model is None:
        raise AdapterError(f"{operand.label!r} is a {method.name}, whose change depends on the base: load it there.")
    w, p = base_weight(operand.model, site), {key: tensor.double() for key, tensor in operand.parts[path].items()}
    dense = w.dense().detach().double()
    b = w.bias()
    wide = None if b is None else b.detach().double()
    if method.offset(wide, p) is not wide:
        raise AdapterError(f"{operand.label!r} changes the bias at {path} other than by a sum, which no LoRA can.")
    return method.changed(dense, p).detach() - dense


def union(operands: Sequence[Operand]) -> tuple[Site, ...]:
    """The sites of all, in the order in which they come.

    Raises:
        AdapterError: two of them mean different places by one path.
    """
    found: dict[str, tuple[Site, Operand]] = {}
    for operand in operands:
        for path, site in operand.sites.items():
            known, first = found.setdefault(path, (site, operand))
            if _place(known) != _place(site):
                raise AdapterError(
                    f"{path} is {_place(known)} for {first.label!r} and {_place(site)} for {operand.label!r}: they "
                    "were made for different models."
                )
    return tuple(site for site, _ in found.values())


def _place(site: Site) -> tuple[object, ...]:
    sizes = (getattr(site, name, None) for name in ("width", "heads", "k_dim", "v_dim"))
    return (site.kind, *(site.shape if isinstance(site, WeightSite) else (size for size in sizes if size is not None)))


def _replaces(key: str) -> bool:
    return "." in key.rpartition(":")[2]  # no tensor of a method has a dot in its name
