"""Looks at adapter folders without a model."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from adapters._errors import AdapterError
from adapters._selection import from_record
from adapters._store import commit, hub
from adapters._store.bundle import CONFIG, OWNED, RECORD, method_record
from adapters._store.parts import part_folder, record_in
from adapters._store.reading import PICKLED, peft_files, resolve
from adapters._store.record import decode
from adapters._store.reports import AdapterInfo

SHOWN: tuple[str, ...] = ("r", "lora_alpha", "use_rslora", "num_virtual_tokens")  # of PEFT's hyperparameters


def inspect(folder: str | os.PathLike[str]) -> AdapterInfo:
    """What a folder holds, every digest, shape and value verified, without a model.

    Raises:
        DamagedAdapter, AdapterError: as `load`.
    """
    place = resolve(folder)
    composition = record_in(place)
    if composition is not None and composition["selection"] is not None:
        return _composition(place, composition)
    with commit.reading(place) as view:
        files = {name: view.size(name) for name in OWNED if name in view}
        if RECORD not in view:
            files |= {PICKLED: view.size(PICKLED)} if PICKLED in view else {}
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
        parameters=bundle.parameters,
        files=files,
        base=base,
        labels=bundle.labels,
        versions=bundle.versions,
        facts={**bundle.facts, **({"tokens": str(bundle.tokens)} if bundle.tokens is not None else {})},
        training=bundle.training,
        created=bundle.created,
    )


def _composition(place: str, record: dict[str, Any]) -> AdapterInfo:
    """What a composition is made of, every part looked at."""
    found = {name: inspect(part_folder(place, name, entry)) for name, entry in record["parts"].items()}
    with commit.reading(place) as view:
        files = {name: view.size(name) for name in OWNED if name in view}
    files |= {entry["folder"]: sum(found[name].files.values()) for name, entry in record["parts"].items()}
    first = next(iter(found.values()), None)
    return AdapterInfo(
        folder=place,
        name=record["name"],
        method=repr(from_record(record["selection"])),
        hyperparameters={name: part.method for name, part in found.items()},
        roles=dict(sum((Counter(part.roles) for part in found.values()), Counter())),
        head=(),
        tensors=sum(part.tensors for part in found.values()),
        parameters=sum(part.parameters for part in found.values()),
        files=files,
        base=first.base if first is not None else {},
    )


def _inspect_peft(place: str, view: commit.View, files: dict[str, int]) -> AdapterInfo:
    if CONFIG not in view:
        raise AdapterError(f"{place} holds no adapter: neither {RECORD} nor {CONFIG} is there.")
    if hub.wrote(view):
        return hub.hub_info(place, view, files)
    config, tensors = peft_files(view)
    shown: dict[str, object] = {
        key: config[key] for key in ("r", "lora_alpha", "use_rslora", "num_virtual_tokens") if key in config
    }
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
