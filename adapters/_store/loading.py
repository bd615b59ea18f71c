"""Reads adapter folders: everything is checked before the model changes."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, Literal

from torch import nn

from adapters._attach import adapters_of, install, labels_of, replace, require_rows, state_of, unwrapped
from adapters._contract import Site
from adapters._errors import AdapterError, DamagedAdapter, WrongBase, nearest
from adapters._interop.peft_read import parse_config, understand
from adapters._sites import SiteMap, sites
from adapters._store import commit
from adapters._store.bundle import CONFIG, OWNED, RECORD, WEIGHTS, Bundle, method_record, require_finite
from adapters._store.fingerprints import check
from adapters._store.record import decode, parse
from adapters._store.reports import AdapterInfo, LoadReport

Force = Literal["wrong-base"]
LARGEST_CONFIG = 16 << 20  # bytes
UNCHECKED = "could not be checked: the folder carries no record of its base"


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
    force: Force | None = None,
) -> LoadReport:
    """Adds the adapter in `folder` (or in a Hub repository) to `model`.

    Args:
        name: what to call it here; None takes the recorded name.
        trainable: whether it goes on training; otherwise it is frozen.
        activate: whether it acts at once.
        force: "wrong-base" loads it on another base than it was trained on; nothing else is skipped.

    Raises:
        WrongBase: the model is not the base that the adapter was trained on.
        DamagedAdapter: a file is missing, truncated or altered, or holds values that are not finite.
        AdapterError: the name is taken, or the folder holds something that this version cannot read.
    """
    place, bundle, notes = read_folder(model, folder)
    base = check_base(model, bundle, force)
    chosen = name if name is not None else bundle.name
    install(
        model,
        chosen,
        bundle.method,
        bundle.sites,
        bundle.tensors,
        head=bundle.head,
        trainable=trainable,
        activate=activate,
        facts=bundle.facts,
        labels=bundle.labels,
        tokens=bundle.tokens,
        map=_map(model, bundle),
    )
    return report(place, chosen, bundle, base, notes)


def _map(model: nn.Module, bundle: Bundle) -> SiteMap | None:
    """The map of the base's sites that the adapter brought along, where none is known yet."""
    state = state_of(model)
    known = state is not None and state.map is not None
    return SiteMap.from_dict(bundle.map) if bundle.map is not None and not known else None


def swap(model: nn.Module, name: str, folder: str | os.PathLike[str], force: Force | None = None) -> LoadReport:
    """Replaces the adapter `name` of `model` by the one in `folder`, in place and all or nothing.

    Raises:
        WrongBase, DamagedAdapter, AdapterError: as `load`; the old adapter then stays.
    """
    attached = adapters_of(model)
    if name not in attached:
        raise AdapterError(f"no adapter {name!r} on this model{nearest(name, attached)} Use adapters.load to add one.")
    place, bundle, notes = read_folder(model, folder)
    base = check_base(model, bundle, force)
    kept: dict[str, Any] = {
        "head": bundle.head,
        "facts": bundle.facts,
        "labels": bundle.labels,
        "tokens": bundle.tokens,
    }
    replace(model, name, bundle.method, bundle.sites, bundle.tensors, **kept)
    return report(place, name, bundle, base, notes)


def inspect(folder: str | os.PathLike[str]) -> AdapterInfo:
    """What a folder holds, every digest, shape and value verified, without a model.

    Raises:
        DamagedAdapter, AdapterError: as `load`.
    """
    place = resolve(folder)
    with commit.reading(place) as view:
        files = {name: view.size(name) for name in OWNED if name in view}
        if RECORD not in view:
            return _inspect_peft(place, view, files)
        bundle = decode(view)
    base = {key: str((bundle.base or {}).get(key) or "") for key in ("name", "class", "model_type")}
    record = method_record(bundle.method)
    return AdapterInfo(
        folder=place,
        name=bundle.name,
        method=record["name"],
        hyperparameters=record["fields"],
        roles=dict(Counter(site.role for site in bundle.sites)),
        head=bundle.head,
        tensors=len(bundle.tensors),
        parameters=_parameters(bundle),
        files=files,
        base=base,
        labels=bundle.labels,
        versions=bundle.versions,
        facts={**bundle.facts, **({"tokens": str(bundle.tokens)} if bundle.tokens is not None else {})},
        training=bundle.training,
        created=bundle.created,
    )


def resolve(folder: str | os.PathLike[str]) -> str:
    """The local folder that a path or a Hub id means; a Hub repository's adapter files are fetched once and cached."""
    place = os.fspath(folder)
    if os.path.isdir(place):
        return place
    if os.path.exists(place) or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", place):
        raise AdapterError(f"{place} is no adapter folder: give a folder, or a Hub id such as 'org/name'.")
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(place, allow_patterns=list(OWNED)))
    except Exception as error:  # the Hub's client has a dozen kinds, from a missing repository to no network
        raise AdapterError(
            f"there is no folder {place} here, and the Hub gave none: {type(error).__name__}."
        ) from error


def read_folder(model: nn.Module, folder: str | os.PathLike[str]) -> tuple[str, Bundle, list[str]]:
    place = resolve(folder)
    with commit.reading(place) as view:
        if RECORD in view:
            bundle = decode(view)
            return place, bundle, [*_label_notes(model, bundle), *_token_notes(bundle)]
        if CONFIG not in view:
            raise AdapterError(f"{place} holds no adapter: neither {RECORD} nor {CONFIG} is there.")
        return place, *_from_peft(model, place, view)


def _from_peft(model: nn.Module, place: str, view: commit.View) -> tuple[Bundle, list[str]]:
    config, tensors = _peft_files(view)
    state = state_of(model)
    known = state.map if state is not None and state.map is not None else sites(model)
    found = understand(config, tensors, model, known)
    name = os.path.basename(os.path.abspath(place))
    bundle = Bundle(name, found.method, found.sites, found.tensors, found.head, map=known.to_dict())
    return bundle, [f"written by PEFT for {found.base}." if found.base else "written by PEFT.", *found.notes]


def _peft_files(view: commit.View) -> tuple[dict, dict]:  # type: ignore[type-arg]
    if WEIGHTS not in view:
        raise DamagedAdapter(f"{WEIGHTS} is missing; pickled weights (.bin) are never read.")
    if view.size(CONFIG) > LARGEST_CONFIG:
        raise DamagedAdapter(f"{CONFIG} has {view.size(CONFIG):,} bytes, more than a configuration needs.")
    config, tensors = parse_config(view[CONFIG]), parse(view[WEIGHTS])
    require_finite(tensors, WEIGHTS)
    return config, tensors


def _inspect_peft(place: str, view: commit.View, files: dict[str, int]) -> AdapterInfo:
    if CONFIG not in view:
        raise AdapterError(f"{place} holds no adapter: neither {RECORD} nor {CONFIG} is there.")
    config, tensors = _peft_files(view)
    shown = {key: config[key] for key in ("r", "lora_alpha", "use_rslora", "num_virtual_tokens") if key in config}
    return AdapterInfo(
        folder=place,
        name=os.path.basename(os.path.abspath(place)),
        method=f"PEFT {config['peft_type']}",
        hyperparameters=shown,
        roles={},
        head=tuple(config.get("modules_to_save") or ()),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        files=files,
        base={"name": str(config.get("base_model_name_or_path") or "")},
        verified=False,
    )


def check_base(model: nn.Module, bundle: Bundle, force: str | None) -> str:
    if force not in (None, "wrong-base"):
        raise AdapterError(f"force is {force!r}; the only check that can be skipped is force='wrong-base'.")
    if bundle.tokens is not None:
        require_rows(unwrapped(model), bundle.tokens)  # first, because here the sentence can say what to do
    if bundle.base is None:
        return UNCHECKED
    try:
        return check(bundle.base, model, exclude=bundle.head)
    except WrongBase as error:
        if force is None:
            raise WrongBase(f"{str(error).rstrip('.')}; force='wrong-base' loads the adapter nevertheless.") from error
        _same_sites(model, bundle)
        return f"wrong, and loaded by force: {error}"


def _same_sites(model: nn.Module, bundle: Bundle) -> None:
    """What no force can help: a model that has not the adapter's sites, in their sizes, would fail in its forward."""
    found = sites(model)
    known: list[Site] = [*found.weights, *found.streams, *found.keyvalues]
    here = {_size(site) for site in known}
    for site in bundle.sites:
        if _size(site) not in here:
            raise AdapterError(
                f"this model has no {site.kind} site {site.path} of the size that the adapter was made for."
            )


def _size(site: Site) -> tuple[object, ...]:
    sizes = ("path", "n_in", "n_out", "experts", "width", "heads", "k_dim", "v_dim")
    return (site.kind, *(getattr(site, name, None) for name in sizes))


def _label_notes(model: nn.Module, bundle: Bundle) -> list[str]:
    here = labels_of(model)
    if bundle.labels is None or here == bundle.labels:
        return []
    return [f"while it is the active one, the model's labels are the adapter's: {', '.join(bundle.labels.values())}."]


def _token_notes(bundle: Bundle) -> list[str]:
    if bundle.tokens is None:
        return []
    return [f"the tokenizer must give these tokens their numbers: {bundle.tokens.named()}."]


def _parameters(bundle: Bundle) -> int:
    return sum(tensor.numel() for tensor in bundle.tensors.values())


def report(place: str, name: str, bundle: Bundle, base: str, notes: list[str]) -> LoadReport:
    count = len(bundle.tensors)
    return LoadReport(
        place, name, bundle.method.name, len(bundle.sites), count, _parameters(bundle), base, tuple(notes)
    )
