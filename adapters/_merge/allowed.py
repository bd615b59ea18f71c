"""What may be merged: one adapter, whose method changes weights, none of them shared with what must stay as it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from torch import nn

from adapters._attach import Adapter, adapters_of, bare_copy
from adapters._contract import WeightSite
from adapters._errors import AdapterError
from adapters._quantize import check_format


def mergeable(model: nn.Module, name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        AdapterError: it is not attached, is not alone, changes no weights, or changes one that is tied to another.
    """
    attached = adapters_of(model)
    if name not in attached:
        raise AdapterError(f"no adapter {name!r} is attached; attached: {', '.join(attached) or 'none'}.")
    if len(attached) > 1:
        others = ", ".join(other for other in attached if other != name)
        raise AdapterError(f"merging {name!r} would change the base of {others}: detach them first.")
    adapter = attached[name]
    if not adapter.method.mergeable:
        raise AdapterError(
            f"{adapter.method.name} does not change weights, so it cannot be merged into them: keep it attached."
        )
    changed = {site.path: (site.path, *site.aliases) for site in adapter.sites if isinstance(site, WeightSite)}
    for head in adapter.head:
        paths = [f"{head}.{key}" for key, _ in bare_copy(model.get_submodule(head)).named_parameters()]
        changed |= {path: (path,) for path in paths}
    check_untied(model, changed)
    return adapter


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


def check_requantize(requantize: str | None, quantised: Collection[str]) -> None:
    """Refuses an unknown format, and one for a base that was never quantised."""
    if requantize is not None:
        check_format(requantize)
    if requantize is not None and not quantised:
        raise AdapterError(
            f"requantize is {requantize!r}, but this base is not quantised: call adapters.quantize after."
        )
