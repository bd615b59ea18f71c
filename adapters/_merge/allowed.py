"""What may be merged: adapters whose methods change weights, none of them shared with what must stay as it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from adapters._attach import Adapter, Tokens, adapters_of, bare_copy, state_of, tensors_of
from adapters._attach.weights import by_site
from adapters._contract import WeightSite
from adapters._errors import AdapterError
from adapters._quantize import check_format
from adapters._selection import Average, Part, Selection, Stack, expanded, names_in


@dataclass(frozen=True)
class Merging:
    """Attached adapters as one change of the base.

    Args:
        selection: the name of one, or a Stack or Average of several.
        adapters: those that it names.
        tensors: of each by site.
    """

    selection: Part
    adapters: Mapping[str, Adapter]
    tensors: Mapping[str, Mapping[str, Mapping[str, Tensor]]]

    @property
    def name(self) -> str:
        return self.selection if isinstance(self.selection, str) else repr(self.selection)

    @property
    def sites(self) -> tuple[WeightSite, ...]:
        """Every weight that one of them changes, once."""
        found = {site.path: site for each in self.adapters.values() for site in each.sites}
        return tuple(site for site in found.values() if isinstance(site, WeightSite))

    @property
    def bearer(self) -> Adapter:
        """The one with a head or tokens, or any."""
        one = next(iter(self.adapters.values()))
        return next((each for each in self.adapters.values() if each.head), one)

    @property
    def tokens(self) -> Tokens | None:
        return self.bearer.tokens


def mergeable(model: nn.Module, chosen: Selection) -> Merging:
    """What the name or selection means.

    Raises:
        AdapterError: it is not attached, others are attached too, it changes no weights or by token, or it changes a
            weight that is tied to another.
    """
    attached, state = adapters_of(model), state_of(model)
    if chosen is None or isinstance(chosen, list | tuple):
        raise AdapterError(f"{chosen!r} cannot be merged: name an adapter, or a Stack or Average of adapters.")
    selection = expanded(chosen, state.named if state is not None else {})
    names = list(dict.fromkeys(names_in(selection)))
    if not names:
        raise AdapterError(f"{chosen!r} names no adapter to merge.")
    for name in names:
        if name not in attached:
            raise AdapterError(f"no adapter {name!r} is attached; attached: {', '.join(attached) or 'none'}.")
    others = [name for name in attached if name not in names]
    if others:
        raise AdapterError(f"merging {chosen!r} would change the base of {', '.join(others)}: detach them first.")
    found = {name: attached[name] for name in names}
    _check_parts(selection, found)
    changed = {
        site.path: (site.path, *site.aliases)
        for adapter in found.values()
        for site in adapter.sites
        if isinstance(site, WeightSite)
    }
    for head in (head for adapter in found.values() for head in adapter.head):
        paths = [f"{head}.{key}" for key, _ in bare_copy(model.get_submodule(head)).named_parameters()]
        changed |= {path: (path,) for path in paths}
    check_untied(model, changed)
    return Merging(selection, found, {name: by_site(tensors_of(model, name)) for name in names})


def _check_parts(selection: Part, found: Mapping[str, Adapter]) -> None:
    for adapter in found.values():
        if not adapter.method.mergeable:
            raise AdapterError(
                f"{adapter.method.name} does not change weights, so it cannot be merged into them: keep it attached."
            )
    if not _by_weights(selection):
        raise AdapterError(f"{selection!r} is no change of weights: a name, Stacks and Averages of names are.")
    several = [adapter.name for adapter in found.values() if adapter.head or adapter.tokens is not None]
    if len(found) > 1 and (len(several) > 1 or any(found[name].tokens is not None for name in several)):
        raise AdapterError(f"{', '.join(several)} of {selection!r} bring heads or tokens: merge one after the other.")
    if several and not isinstance(selection, str) and _averages(selection):
        raise AdapterError(f"{several[0]} brings a head, of which an Average takes no part: merge it in a Stack.")


def _averages(selection: Part) -> bool:
    if selection is None or isinstance(selection, str):
        return False
    return isinstance(selection, Average) or any(map(_averages, selection.parts))


def _by_weights(selection: Part) -> bool:
    if selection is None or isinstance(selection, str):
        return True
    return isinstance(selection, Stack | Average) and all(map(_by_weights, selection.parts))


def check_untied(model: nn.Module, changed: Mapping[str, Collection[str]]) -> None:
    """Refuses to change a parameter that is known by another path than those given for it."""
    names: dict[int, list[str]] = defaultdict(list)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(path)
    for path, expected in changed.items():
        owner, _, name = path.rpartition(".")
        for other in names[id(model.get_submodule(owner)._parameters[name])]:
            if other == path:
                continue
            if isinstance(model.get_submodule(other.rpartition(".")[0]), nn.Embedding):
                raise AdapterError(
                    f"{path} is tied to the embeddings, which merging would change too: untie them first."
                )
            if other not in expected:
                raise AdapterError(f"{path} is tied to {other}, which merging would change too: untie them first.")


def check_requantize(requantize: str | None, formats: Collection[str]) -> None:
    """Refuses an unknown format, and one for a base that was never in 4 bits."""
    if requantize is not None:
        check_format(requantize)
    if requantize is not None and (not formats or "int8" in formats):
        held = f"is held in {' and '.join(formats)}" if formats else "is not quantised"
        raise AdapterError(f"requantize is {requantize!r}, but this base {held}: call adapters.quantize after.")
