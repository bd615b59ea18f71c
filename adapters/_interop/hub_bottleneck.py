"""AdapterHub's bottleneck layers in our words.

Theirs (src/adapters/methods/modeling.py, class Adapter; Houlsby et al., 2019, arXiv 1902.00751; Pfeiffer et al., 2020,
arXiv 2005.00247): y' = y + s (U f(D h + c) + e), where y is what a branch adds to the residual stream r, and h = y;
h = r where `is_parallel`; h = y + r where `original_ln_before`, after the norm that a post-norm model has there,
LN(z) = g n(z) + b, whose weights become part of ours: D LN(z) + c = (D g) n(z) + (D b + c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters._contract import StreamSite
from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import CONFIG
from adapters._interop.hub_folder import (
    FromHub,
    HubFiles,
    anchor,
    by_owner,
    flag,
    number,
    refuse_options,
    require_layers,
)
from adapters._interop.hub_places import Places
from adapters._sites.discover import discover
from adapters.methods.bottleneck import Activation, Bottleneck, Reads

ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh"}
RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # what files without a version mean
# read below, or without effect on a finished adapter; the last two have one only beside options that are refused
NEUTRAL = {
    "architecture", "cross_adapter", "dropout", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity",
    "init_weights", "init_weights_seed", "inv_adapter", "inv_adapter_reduction_factor", "invertible_adapter",
    "is_parallel", "learn_phm", "leave_out", "mh_adapter", "non_linearity", "original_ln_before", "output_adapter",
    "phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "reduction_factor", "scaling", "shared_W_phm",
    "shared_phm_rule", "stochastic_depth", "residual_before_ln", "adapter_residual_before_ln",
}  # fmt: skip
KNOWN = {
    "ln_after": False, "ln_before": False, "original_ln_after": True, "phm_layer": False, "use_gating": False,
}  # fmt: skip
PLAIN: tuple[Reads, float] = ("branch", Bottleneck.eps)
LEARNED = ("learned", "channel")  # values of `scaling`: a number or a vector that was trained
PARTS = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}


def read_bottleneck(own: Mapping[str, Any], files: HubFiles, model: nn.Module) -> FromHub:
    """A bottleneck adapter with AdapterHub's options `own`, each layer where it acts."""
    refuse_options(own, NEUTRAL, KNOWN)
    _refuse_others(own, files)
    owners = by_owner(files, "adapters", model)
    places = Places(discover(model, None), files.interface, model)
    require_layers(owners, places.trace.sites.streams, own.get("leave_out"))
    sites = {owner: places.at(owner) for owner in owners}
    _require_branches(own, sites, places.trace.sites.streams)
    held = {owner: _tensors(own, sites[owner], parts) for owner, parts in owners.items()}
    parallel = flag(own, "is_parallel", False)
    reads, eps = PLAIN
    if parallel:
        sites = {owner: _reading_residual(places, site, owner) for owner, site in sites.items()}
    elif flag(own, "original_ln_before", False):
        sites, held, (reads, eps) = _summed(places, sites, held)
    ours = {f"{sites[owner].path}:{name}": tensor for owner, parts in held.items() for name, tensor in parts.items()}
    inner = {site.path: ours[f"{site.path}:down"].shape[0] for site in sites.values()}
    method = Bottleneck(
        placement="parallel" if parallel else "houlsby" if flag(own, "mh_adapter") else "pfeiffer",
        reduction_factor=_factor(own["reduction_factor"], inner, next(iter(sites.values())).width),
        activation=_activation(str(own["non_linearity"]).lower(), files.config.get("version")),
        reads=reads,
        eps=eps,
        scale=1.0 if own.get("scaling") in LEARNED else number(own.get("scaling", 1.0), "scaling"),
    )
    return FromHub(method, tuple(sites.values()), ours, notes=_notes(own, inner))


def _refuse_others(own: Mapping[str, Any], files: HubFiles) -> None:
    """Refuses further options; version 1's task adapters name invertible layers which they do not have."""
    if (own.get("inv_adapter") or own.get("invertible_adapter")) and files.config.get("type") != "text_task":
        raise AdapterError("the adapter has invertible layers at the embeddings (inv_adapter), and no method here has.")
    summed = flag(own, "original_ln_before", False) and not flag(own, "is_parallel", False)
    if own.get("residual_before_ln", True) is not True and (summed or own["residual_before_ln"] is not False):
        raise AdapterError(f"{CONFIG} sets residual_before_ln to {str(own['residual_before_ln'])[:60]!r}.")


def _require_branches(own: Mapping[str, Any], sites: Mapping[str, StreamSite], streams: Sequence[StreamSite]) -> None:
    """What the options name, and nothing else: AdapterHub ignores what it was not told of."""
    kinds = {site.path: _kind(site, streams) for site in streams}
    told = {
        "mh_adapter": flag(own, "mh_adapter"),
        "cross_adapter": flag(own, "cross_adapter", False) and "cross_adapter" in kinds.values(),
        "output_adapter": flag(own, "output_adapter"),
    }
    found, wanted = {kinds[site.path] for site in sites.values()}, {kind for kind, said in told.items() if said}
    if found != wanted:
        raise DamagedAdapter(f"the file holds tensors of {sorted(found)}, and {CONFIG} speaks of {sorted(wanted)}.")
    if len({site.path for site in sites.values()}) != len(sites):
        raise AdapterError("two of the adapter's layers act at one branch of this model.")


def _kind(site: StreamSite, streams: Sequence[StreamSite]) -> str:
    """AdapterHub's option for the layers at such a site: a block's second attention is to another stream."""
    if site.branch != "attention":
        return "output_adapter"
    first = next(other for other in streams if other.block == site.block and other.branch == "attention")
    return "mh_adapter" if site == first else "cross_adapter"


def _reading_residual(places: Places, site: StreamSite, owner: str) -> StreamSite:
    found = places.reading_residual(site, anchor(owner))
    if found is None:
        raise AdapterError(f"AdapterHub gives its layer at {site.path} no residual stream to read.")
    return found


def _summed(
    places: Places, sites: Mapping[str, StreamSite], held: Mapping[str, dict[str, Tensor]]
) -> tuple[dict[str, StreamSite], dict[str, dict[str, Tensor]], tuple[Reads, float]]:
    """Sites, tensors and what they read, for h = y + r: in a post-norm model D and c with the norm in them."""
    reading, folded, read = dict(sites), dict(held), set()
    for owner, site in sites.items():
        found, norm = places.reading_residual(site, anchor(owner)), places.norm_after(site, anchor(owner))
        reading[owner] = found or site
        folded[owner] = held[owner] | (_folded(held[owner], norm) if norm is not None else {})
        read.add(PLAIN if found is None else ("sum", PLAIN[1]) if norm is None else ("normed", norm.eps))
    if len(read) > 1:
        raise AdapterError("the adapter's layers read sums of several kinds, and those of one method read one.")
    return reading, folded, read.pop()


def _folded(held: Mapping[str, Tensor], norm: nn.LayerNorm) -> dict[str, Tensor]:
    down = held["down"].double()
    weight, bias = (None if w is None else w.detach().double().cpu() for w in (norm.weight, norm.bias))
    shift = held["down_bias"].double() + (0 if bias is None else down @ bias)
    scaled = down if weight is None else down * weight
    return {"down": scaled.to(torch.float32), "down_bias": shift.to(torch.float32)}


def _tensors(own: Mapping[str, Any], site: StreamSite, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scaling = own.get("scaling", 1.0)
    wanted = {*PARTS.values(), *(("scaling",) if scaling in LEARNED else ())}
    for part in sorted(wanted ^ set(parts)):
        what = "lacks" if part in wanted else "holds"
        raise DamagedAdapter(f"the file {what} {part} of {site.path}, unlike what {CONFIG} says.")
    held = {name: parts[part] for name, part in PARTS.items()}
    inner = held["down"].shape[0] if held["down"].dim() else 0
    shapes = {"down": (inner, site.width), "down_bias": (inner,), "up": (site.width, inner), "up_bias": (site.width,)}
    for name, tensor in held.items():
        if tensor.shape != shapes[name] or not tensor.is_floating_point():
            raise AdapterError(f"the adapter's {PARTS[name]} at {site.path} has the shape {list(tensor.shape)}.")
    if scaling in LEARNED:
        held |= _scaled(held, parts["scaling"], site)
    return held


def _scaled(held: Mapping[str, Tensor], learned: Tensor, site: StreamSite) -> dict[str, Tensor]:
    """U and e with a learned scaling in them: s (U f + e) = (s U) f + s e, s (1) or (width)."""
    if tuple(learned.shape) not in ((1,), (site.width,)):
        raise AdapterError(f"the adapter's scaling at {site.path} is {list(learned.shape)}, not 1 or {site.width}.")
    s = learned.double()
    up, bias = (s.unsqueeze(-1) * held["up"].double()), s * held["up_bias"].double()
    return {"up": up.to(torch.float32), "up_bias": bias.to(torch.float32)}


def _factor(factors: Any, inner: Mapping[str, int], width: int) -> float:
    """The reduction factor, which a dictionary gives layer by layer; the tensors must have widths that it makes."""
    given = list(factors.values()) if isinstance(factors, Mapping) else [factors]
    values = [number(value, "reduction_factor") for value in given]
    made = {max(1, int(width // value)): value for value in values}
    for path, found in inner.items():
        if found not in made:
            raise DamagedAdapter(f"{path} has a bottleneck of {found} units, unlike what {CONFIG} says.")
    return made[next(iter(inner.values()))]


def _activation(name: str, version: Any) -> Activation:
    name = RENAMED.get(name, name) if version is None else name
    if name not in ACTIVATIONS:
        raise AdapterError(f"the activation {name[:60]!r} is none of those here: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _notes(own: Mapping[str, Any], inner: Mapping[str, int]) -> tuple[str, ...]:
    trained = {name: str(own[name])[:20] for name in ("dropout", "stochastic_depth") if own.get(name)}
    notes = [f"AdapterHub trained it with {name} {p}, which a bottleneck here has not." for name, p in trained.items()]
    if own.get("scaling") in LEARNED:
        notes.append("its learned scaling is part of the up projection now.")
    if len(set(inner.values())) > 1:
        notes.append(f"its layers have bottlenecks of {', '.join(map(str, sorted(set(inner.values()))))} units.")
    return tuple(notes)
