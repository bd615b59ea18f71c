"""Makes the modules that hold an adapter's tensors, finds them again, and puts them in their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from adapters._attach.called import CalledWeight, ReadWeight, ScaledInput
from adapters._attach.container import CHILD, Container, Entry, KeyValue, LayerStates
from adapters._attach.heads import replica_of
from adapters._attach.inside import WRITTEN
from adapters._attach.joined import is_product
from adapters._attach.revised import NewRows, rows_key
from adapters._attach.state import Adapter, State
from adapters._attach.streamed import Fusion, Stream
from adapters._attach.swap import (
    CALL,
    HOLD,
    LAYER,
    READ,
    SCALED,
    TAP,
    TAPPED_BY,
    TOKENS,
    add_faces,
    base_class,
)
from adapters._attach.tables import check_rows, owners, table_of
from adapters._attach.tokens import ROWS
from adapters._attach.virtual import entry_of_layers
from adapters._attach.weights import base_weight, by_site
from adapters._coded import is_coded
from adapters._contract import (
    FusionMethod,
    KeyValueMethod,
    KeyValueSite,
    LayerSite,
    Site,
    StreamMethod,
    StreamSite,
    WeightMethod,
    WeightSite,
)
from adapters._errors import AdapterError
from adapters._fourbit import is_quantized


@dataclass(frozen=True)
class Made:
    """A change that is ready to be placed: an entry `key` below the module `owner`, and the owner's new face."""

    owner: str
    key: str
    entry: nn.Module | None  # None: the module only gets a face
    face: str  # "": it needs none


def make_entries(model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]) -> list[Made]:
    """All entries of an adapter, made and checked while the model is still untouched."""
    held = by_site({key: tensor for key, tensor in tensors.items() if not key.endswith(f":{ROWS}")})
    made: list[Made] = []
    for site in adapter.sites:
        given = held.pop(site.path, None)
        if not given:
            raise AdapterError(f"adapter {adapter.name!r} has no tensors for its site {site.path}.")
        device = device_of(model, site)
        made += _at_site(model, adapter, site, {key: tensor.to(device) for key, tensor in given.items()})
    layers = tuple(site for site in adapter.sites if isinstance(site, LayerSite))
    made += [Made(entry_of_layers(model, layers), adapter.slot, None, TOKENS)] if layers else []
    made += [Made(path, adapter.slot, replica_of(model, path, held.pop(path, {})), CALL) for path in adapter.head]
    made += _rows(model, adapter, {key: tensor for key, tensor in tensors.items() if key.endswith(f":{ROWS}")})
    _check_tables(model, adapter, by_site(tensors))
    if held:
        raise AdapterError(f"adapter {adapter.name!r} has tensors for {next(iter(held))}, which is none of its sites.")
    _check_places(model, adapter, made)
    return made


def device_of(model: nn.Module, site: Site) -> torch.device:
    """Where an adapter's tensors at a site belong: beside the weights there."""
    owner = site.owner if isinstance(site, WeightSite) else site.path
    here = next(submodule(model, owner).parameters(), None)
    return here.device if here is not None else next(model.parameters()).device


def _rows(model: nn.Module, adapter: Adapter, given: Mapping[str, Tensor]) -> list[Made]:
    """The rows of an adapter's tokens, one entry a table, at every module that holds it."""
    tokens = adapter.tokens
    known = {tokens.key(table) for table in tokens.tables} if tokens is not None else set()
    if not given.keys() <= known:
        raise AdapterError(f"adapter {adapter.name!r} has {min(given.keys() - known)}, which is none of its tables.")
    if tokens is None:
        return []
    check_rows(model, tokens, given, adapter.head)
    made = []
    for table in tokens.tables:
        device = cast(Tensor, table_of(model, table)).device
        entry = NewRows(tokens.ids, given[tokens.key(table)].to(device))
        made += [Made(owner, rows_key(adapter.slot, name), entry, READ + name) for owner, name in owners(model, table)]
    return made


def _check_tables(model: nn.Module, adapter: Adapter, held: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuses a method at a table of tokens unless its change is added to it: what it scales, it would scale there."""
    tables = [table_of(model, table) for table in adapter.tokens.tables] if adapter.tokens is not None else []
    for site in adapter.sites if tables else ():
        method = adapter.method.at(site)
        shared = isinstance(site, WeightSite) and any(table_of(model, site.path) is table for table in tables)
        if shared and isinstance(method, WeightMethod) and method.factors(held[site.path]) is None:
            raise AdapterError(
                f"{method.name} would scale {site.path}, where rows of tokens train: leave it out of targets=."
            )


def _check_places(model: nn.Module, adapter: Adapter, made: list[Made]) -> None:
    places = [(change.owner, change.key) for change in made if change.entry is not None]
    below = [(path, head) for path, _ in places for head in adapter.head if path.startswith(f"{head}.")]
    if below or len(set(places)) < len(places):
        twice = " below ".join(below[0]) if below else "one module"
        raise AdapterError(f"adapter {adapter.name!r} acts twice at {twice}: a head is trained whole or not adapted.")
    check_free(model, [owner for owner, _ in places])


def check_free(model: nn.Module, owners: Iterable[str]) -> None:
    """Refuses modules where nothing can be attached.

    Raises:
        AdapterError: the place is taken, or torch reads the weights without calling the module.
    """
    for owner in owners:
        module = submodule(model, owner)
        if hasattr(module, CHILD) and not isinstance(module._modules.get(CHILD), Container):
            raise AdapterError(f"{owner} has an attribute {CHILD!r} of its own, where adapters would be held.")
        for above in _ancestors(owner):
            if isinstance(submodule(model, above), nn.TransformerEncoderLayer | nn.MultiheadAttention):
                raise AdapterError(f"{owner} lies in torch's {above}, whose fused path would go past the adapter.")


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _at_site(model: nn.Module, adapter: Adapter, site: Site, given: Mapping[str, Tensor]) -> list[Made]:
    method, slot = adapter.method.at(site), adapter.slot
    try:
        owner = submodule(model, site.owner if isinstance(site, WeightSite) else site.path)
        tap = submodule(model, site.tap) if isinstance(site, StreamSite) and site.tap is not None else None
    except KeyError as error:
        raise AdapterError(f"this model has no {site.path}, where adapter {adapter.name!r} acts.") from error
    if isinstance(site, WeightSite) and isinstance(method, WeightMethod):
        if owner._parameters.get(site.parameter) is None:
            raise AdapterError(f"this model has no {site.path}, where adapter {adapter.name!r} acts.")
        return _at_weight(model, slot, method, site, given)
    if isinstance(site, StreamSite) and isinstance(method, FusionMethod):
        return [Made(site.path, slot, Fusion(method, site, given), CALL)]
    if isinstance(site, StreamSite) and isinstance(method, StreamMethod):
        tap = tap if method.reads_input() else None
        tapped = [Made(site.tap, slot, None, TAP)] if tap is not None and site.tap is not None else []
        return [Made(site.path, slot, Stream(method, site, given, tap), CALL), *tapped]
    if isinstance(site, KeyValueSite) and isinstance(method, KeyValueMethod):
        face = HOLD if site.product is None else f"{WRITTEN}{site.product}"
        return [Made(site.path, slot, KeyValue(method, site, given), face)]
    if isinstance(site, LayerSite) and isinstance(method, KeyValueMethod):
        return [Made(site.path, slot, LayerStates(method, site, given), LAYER)]
    raise AdapterError(f"method {method.name!r} acts on {method.kind} sites, and {site.path} is a {site.kind} site.")


def _at_weight(
    model: nn.Module, slot: str, method: WeightMethod, site: WeightSite, given: Mapping[str, Tensor]
) -> list[Made]:
    w, owner = base_weight(model, site), submodule(model, site.owner)
    if not is_coded(w.stored) and not _fits(w.stored, site, w.transposed):
        found = tuple(w.stored.shape)
        raise AdapterError(f"{site.path} is {found} in this model, and the adapter was made for {site.shape}.")
    low = method.factors(given)
    if low is not None and (*low.left.shape[:-1], low.right.shape[-1]) != site.shape:
        raise AdapterError(f"the tensors for {site.path} do not form a change of shape {site.shape}.")
    if low is not None and low.bias is not None and site.access == "read":
        raise AdapterError(f"method {method.name!r} trains a bias at {site.path}, whose weight is read and not called.")
    if site.access == "read":
        entry: nn.Module = ReadWeight(method, site, given, w)
    elif method.inputs(given) is not None:
        entry = ScaledInput(method, site, given)
    else:
        # the outputs of these forwards come straight from a product, so the delta may be added into them; an 8-bit
        # layer's is a view that autograd lets nobody write to
        fresh = (base_class(owner).forward is nn.Linear.forward or is_quantized(w.stored)) and not site.aliases
        entry = CalledWeight(method, site, given, w, fresh, is_product(base_class(owner)))
    # a parameter that several modules share has one adapter, which acts at each of them
    shared = [path for path in site.aliases if not isinstance(submodule(model, path.rpartition(".")[0]), nn.Embedding)]
    return [Made(*_location(slot, path, site), entry, _face(path, site, entry)) for path in (site.path, *shared)]


def _fits(stored: Tensor, site: WeightSite, transposed: bool) -> bool:
    if site.folded and tuple(stored.shape[1:]) != site.folded:
        return False
    rows, columns = (stored.shape[0], prod(site.folded)) if site.folded else stored.shape[-2:]
    lead = () if site.folded else tuple(stored.shape[:-2])
    return (*lead, *((columns, rows) if transposed else (rows, columns))) == site.shape


def _face(path: str, site: WeightSite, entry: nn.Module) -> str:
    if site.access == "read":
        return READ + path.rpartition(".")[2]
    return SCALED if isinstance(entry, ScaledInput) else CALL


def place(model: nn.Module, state: State, made: list[Made], trainable: bool) -> None:
    """Makes the changes. Nothing in here can be refused."""
    for change in made:
        module = submodule(model, change.owner)
        if change.face:
            add_faces(module, state, change.face)
        if change.entry is None and change.face == TAP:
            module.__dict__[TAPPED_BY] = module.__dict__.get(TAPPED_BY, frozenset()) | {change.key}
        if change.entry is None:
            continue
        if CHILD not in module._modules:
            module.add_module(CHILD, Container())
        container = module._modules[CHILD]
        assert container is not None
        change.entry.requires_grad_(trainable)
        container._modules[change.key] = change.entry
        container.train(module.training)


def _location(slot: str, path: str, site: Site) -> tuple[str, str]:
    """The module below which an entry lives, and the entry's name there."""
    if not isinstance(site, WeightSite):
        return path, slot
    owner, _, parameter = path.rpartition(".")
    return owner, slot if site.access == "call" else f"{slot}-{parameter}"


def adapter_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors, keyed `f"{site.path}:{tensor}"`, and its heads' as `f"{module}:head.{parameter}"`.

    Parameters of its entries, or views of its row.
    """
    found: dict[str, Tensor] = {}
    if adapter.row is not None and adapter.row.away:
        raise AdapterError(f"{adapter.name!r} is in its pool, not in memory: activate it, or pin it, first.")
    for site in adapter.sites:
        held = adapter.row.at(site.path) if adapter.row is not None else entry_of(model, adapter, site).own()
        found.update({f"{site.path}:{key}": p for key, p in held.items()})
    for path in adapter.head:
        replica = submodule(model, path)._modules[CHILD]._modules[adapter.slot]  # type: ignore[union-attr]
        found.update({f"{path}:{key}": p for key, p in cast(nn.Module, replica).named_parameters()})
    for table in adapter.tokens.tables if adapter.tokens is not None else ():
        owner, _, name = table.rpartition(".")
        entry = submodule(model, owner)._modules[CHILD]._modules[rows_key(adapter.slot, name)]  # type: ignore[union-attr]
        found[f"{table}:{ROWS}"] = cast(NewRows, entry).rows
    return found


def submodule(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)` at a tenth of its cost, which every site pays; KeyError where there is none."""
    for name in path.split(".") if path else ():
        model = cast(nn.Module, model._modules[name])
    return model


def entry_of(model: nn.Module, adapter: Adapter, site: Site) -> Entry:
    """The module that holds an adapter's tensors at a site."""
    owner, key = _location(adapter.slot, site.path, site)
    return cast(Entry, submodule(model, owner)._modules[CHILD]._modules[key])  # type: ignore[union-attr]


def drop_slot(model: nn.Module, slot: str) -> None:
    """Removes the entries of one version of an adapter."""
    for module in model.modules():
        held = module._modules.get(CHILD)
        if not isinstance(held, Container):
            continue
        for key in [key for key in held._modules if key == slot or key.startswith(f"{slot}-")]:
            del held._modules[key]


def entries_of(model: nn.Module, slot: str) -> list[object]:
    """Every entry of one slot."""
    held = [module._modules.get(CHILD) for module in model.modules()]
    entries = [container._modules.get(slot) for container in held if isinstance(container, Container)]
    return [entry for entry in entries if entry is not None]
