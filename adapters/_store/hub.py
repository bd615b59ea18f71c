"""Folders that AdapterHub's library wrote: their files, found by name and read without unpickling, as a bundle."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.hub_folder import HubFiles, is_hub
from adapters._interop.hub_read import kind_of, understand
from adapters._sites import SiteMap
from adapters._store import zipped
from adapters._store.bundle import CONFIG, LARGEST_CONFIG, Bundle, require_finite
from adapters._store.commit import View
from adapters._store.reports import AdapterInfo
from adapters._store.weights import parse

# what AdapterHub calls them, safetensors first (src/adapters/utils.py)
TENSORS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD, HEAD_TENSORS = "head_config.json", ("model_head.safetensors", "pytorch_model_head.bin")
INTERFACE, FUSION = "adapter_interface.json", "adapter_fusion_config.json"
NAMES = (*TENSORS, HEAD, *HEAD_TENSORS, INTERFACE)  # beside adapter_config.json


def wrote(view: View) -> bool:
    """Whether AdapterHub wrote the folder, by what its configuration says."""
    if CONFIG not in view or view.size(CONFIG) > LARGEST_CONFIG:
        return False
    try:
        return is_hub(json.loads(view[CONFIG].decode()))
    except (ValueError, RecursionError):
        return False


def hub_bundle(model: nn.Module, sites: SiteMap, view: View, check: bool) -> Bundle:
    """The adapter as a bundle for this model.

    Raises:
        AdapterError: it computes something that no method here does, or this model has not its modules.
        DamagedAdapter: a file is missing or damaged, or values are not finite.
    """
    files = hub_files(view, check)
    found = understand(files, model, sites)
    notes = (f"written by AdapterHub for {files.base}.", *files.notes, *found.notes)
    digest = hashlib.sha256(b"".join(view[name] for name in (CONFIG, *NAMES) if name in view)).hexdigest()
    kept: dict[str, Any] = {"labels": found.labels, "map": sites, "notes": notes, "digest": digest}
    return Bundle(files.name, found.method, found.sites, found.tensors, found.head, **kept)


def hub_files(view: View, check: bool = True) -> HubFiles:
    """The configuration and the tensors of a folder that AdapterHub wrote, and of the head beside them."""
    config = _json(view, CONFIG)
    if not isinstance(config.get("name"), str) or not isinstance(config.get("model_type"), str):
        raise DamagedAdapter(f"{CONFIG} does not name an adapter and its model's type as AdapterHub does.")
    tensors = _tensors(view, TENSORS, check)
    if tensors is None:
        raise DamagedAdapter(f"the folder has neither {TENSORS[0]} nor {TENSORS[1]}, which AdapterHub writes.")
    notes = [f"{TENSORS[1]} was not read, as {TENSORS[0]} is there."] if set(TENSORS) <= set(view) else []
    if FUSION in view:
        notes.append(f"its AdapterFusion, {FUSION}, was left out.")
    head = _tensors(view, HEAD_TENSORS, check)
    if head is not None and HEAD not in view:
        notes.append(f"its head was left out, as {HEAD} is missing.")
    head_config = _json(view, HEAD) if HEAD in view and head is not None else None
    interface = _json(view, INTERFACE).get("interface") if INTERFACE in view else None
    if INTERFACE in view and not isinstance(interface, dict):
        raise DamagedAdapter(f"{INTERFACE} does not describe an interface as AdapterHub does.")
    return HubFiles(config, tensors, head_config, head or {}, interface, tuple(notes))


def hub_info(place: str, view: View, files: dict[str, int]) -> AdapterInfo:
    """What can be said of the folder without a model."""
    held = hub_files(view)
    own = held.config["config"] if isinstance(held.config["config"], dict) else {}
    shown = ("r", "alpha", "attn_matrices", "reduction_factor", "non_linearity", "original_ln_before", "is_parallel")
    files |= {name: view.size(name) for name in NAMES if name in view}
    return AdapterInfo(
        folder=place,
        name=held.name,
        method=f"AdapterHub {kind_of(own)}",
        hyperparameters={key: own[key] for key in shown if key in own},
        roles={},
        head=(),
        tensors=len(held.tensors),
        parameters=sum(tensor.numel() for tensor in held.tensors.values()),
        files=files,
        base={"name": held.base, "model_type": str(held.config["model_type"])},
        verified=False,
    )


def refuse_as_peft(view: View) -> None:
    """Says of a folder of AdapterHub's why other programs cannot read it, where they read PEFT's."""
    if wrote(view):
        raise AdapterError("the folder was written by AdapterHub: load it onto its base and save it first.")


def _json(view: View, name: str) -> dict[str, Any]:
    if view.size(name) > LARGEST_CONFIG:
        raise DamagedAdapter(f"{name} has {view.size(name):,} bytes, more than a configuration needs.")
    try:
        found = json.loads(view[name].decode())
    except (ValueError, RecursionError) as error:
        raise DamagedAdapter(f"{name} is truncated or damaged: it is not JSON.") from error
    if not isinstance(found, dict):
        raise DamagedAdapter(f"{name} is no JSON object.")
    return found


def _tensors(view: View, names: tuple[str, str], check: bool) -> dict[str, Tensor] | None:
    """The tensors of the first of the two files that is there; None where none is."""
    name = next((name for name in names if name in view), None)
    if name is None:
        return None
    content = view[name]
    found = zipped.parse(content, name) if name.endswith(".bin") else parse(content)
    if check:
        require_finite(found, name)
    return found
