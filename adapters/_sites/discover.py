"""Finds the sites of a model by running it once on a tiny batch; no architecture is known by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from adapters._contract import KeyValueSite
from adapters._errors import AdapterError
from adapters._heads import base_model
from adapters._sites.aside import branch_aside, differentiable, generalise, set_aside
from adapters._sites.attention import written_out
from adapters._sites.graph import Graph
from adapters._sites.layers import layer_sites
from adapters._sites.map import SiteMap
from adapters._sites.places import keyvalue_sites, stream_sites, unplaced
from adapters._sites.probe import Example, Probe, padded, probes
from adapters._sites.roles import find_roles
from adapters._sites.still import observed_attention, stand_ins, still, unadapted
from adapters._sites.streams import Branch, find_branches
from adapters._sites.tappable import tappable, tried
from adapters._sites.trace import Tracer, record
from adapters._sites.unbranched import unbranched
from adapters._sites.unreadable import refusal, unreadable
from adapters._sites.weights import split, weight_sites


def sites(model: nn.Module, example: Example = None) -> SiteMap:
    """Every place of `model` where a method can act, found by one traced forward without gradients.

    The model comes back bit for bit as it was, and no random state moves.

    Args:
        model: Any module; nothing is assumed about its names or its architecture.
        example: Arguments of a small forward, at least two rows and tokens: a mapping of keyword arguments, a
            sequence of positional ones, or a tensor. Made up where the model takes `input_ids` or `pixel_values`.

    Raises:
        AdapterError: The model could not be run on the example, or on one made up for it.
    """
    return discover(model, example).sites


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of a tiny forward: the first of those made up for the probe that the model accepts."""
    failure: Exception | None = None
    for probe in probes(model, None):
        try:
            with still(model), padded(model), torch.no_grad():
                model(**probe.kwargs)
            return probe.kwargs
        except Exception as error:  # whatever a stranger's forward may raise; it is passed on below
            failure = failure or error
    raise AdapterError(f"no tiny batch could be made up for {type(model).__name__}: {failure}; pass example=.")


@dataclass(frozen=True)
class Discovery:
    """A model's map, and what it was read off."""

    sites: SiteMap
    graph: Graph
    branches: tuple[Branch, ...]


def discover(model: nn.Module, example: Example) -> Discovery:
    """Traces `model` once. Arguments and errors are those of `sites`."""
    with unadapted(model):
        return _discover(model, example)


def _discover(model: nn.Module, example: Example) -> Discovery:
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    graph, probe = _run(model, modules, parameters, example)
    graph.written.extend(written_out(graph))
    branches, loose = find_branches(graph, modules)
    branches += unbranched(graph, modules, branches)
    roles = find_roles(graph, [*branches, *loose])
    aside = set_aside(graph, model, parameters, roles, branches)
    weights = weight_sites(graph, modules, parameters, roles, aside)
    more, unreached, others = generalise(weights, graph, modules, parameters)
    hidden = unreadable(modules)
    trained, base = differentiable(graph.results), base_model(model)
    below = set(base.modules()) if base is not None else set()
    reason = partial(
        branch_aside,
        branches=branches,
        trained=trained,
        aside=aside,
        inside={path for path, module in modules.items() if module in below},
    )
    found = SiteMap(
        model=type(model).__name__,
        weights=tuple(site for site in (*weights, *more) if site.owner not in hidden),
        streams=tuple(stream_sites(graph, branches, reason)),
        keyvalues=tuple(_attentions(model, modules, parameters, graph, probe, trained)),
        layers=tuple(layer_sites(graph, modules)),
        unreached=(*hidden.values(), *(each for each in unreached if split(each.path)[0] not in hidden)),
        others=tuple(each for each in others if split(each.path)[0] not in hidden),
        unplaced=tuple(unplaced(branches, loose)),
    )
    return Discovery(found, graph, (*branches, *loose))


def _attentions(
    model: nn.Module,
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    graph: Graph,
    probe: Probe,
    trained: set[int],
) -> list[KeyValueSite]:
    """Attentions of transformers' interface, and those in the model's own code, in which a prefix is tried out."""
    found = keyvalue_sites(graph, trained)
    own = tappable(graph, trained, {site.path for site in found})
    if own:
        with still(model), padded(model), stand_ins(Tracer(parameters, modules)):
            own = tried(own, modules, partial(model, *probe.args, **probe.kwargs), probe.rows)
    return [*found, *own]


def _run(
    model: nn.Module, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter], example: Example
) -> tuple[Graph, Probe]:
    failure: Exception | None = None
    for probe in probes(model, example):
        tracer = Tracer(parameters, modules, probe.rows)
        try:
            with still(model), padded(model), stand_ins(tracer), observed_attention(tracer):
                return record(tracer, partial(model, *probe.args, **probe.kwargs)), probe
        except Exception as error:  # whatever a stranger's forward may raise; it is passed on below
            failure = failure or error
    if why := refusal(unreadable(modules).values()):
        raise AdapterError(f"{why}.") from failure
    raise AdapterError(
        f"the sites of {type(model).__name__} are found by running it once, and it failed with "
        f"{type(failure).__name__}: {failure}; pass an example that it accepts, as in sites(model, example={{...}})"
    ) from failure
