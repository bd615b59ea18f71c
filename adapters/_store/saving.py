"""Writes one attached adapter into a folder, in one step."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from adapters._attach import Adapter, adapters_of, state_of, tensors_of, unwrapped
from adapters._contract import KeyValueSite
from adapters._errors import AdapterError, DamagedAdapter, nearest
from adapters._interop.files import PeftFiles
from adapters._interop.peft_tokens import with_tokens
from adapters._interop.peft_write import express, marker
from adapters._interop.prefix_proof import require_alike
from adapters._sharded import is_sharded, require_gatherable, whole, writes
from adapters._store import commit
from adapters._store.bundle import CARD, CONFIG, OWNED, RECORD, WEIGHTS, Bundle, method_record, require_finite
from adapters._store.card import card, ours
from adapters._store.fingerprints import fingerprint
from adapters._store.record import encode, json_safe
from adapters._store.reports import SaveReport

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
REORDERED = "PEFT keeps these tensors in another order: `export_peft` and `adapters export --to peft` write that"
LIBRARIES = ("adapter-registry", "torch", "transformers", "safetensors")


def save(
    model: nn.Module,
    name: str,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> SaveReport:
    """Writes the adapter `name` of `model` into `folder`: its tensors, its record, a model card, PEFT's configuration.

    Only the adapter's own four files are replaced, as one step that a crash cannot divide. Where the model is sharded
    over processes (FSDP2), all of them must call; the first one writes.

    Args:
        dtype: what the tensors are stored as ("bfloat16" halves the file and rounds them); None keeps their own.
        facts: what to remember of the training: data, steps, scores; JSON-able.

    Raises:
        AdapterError: no such adapter, a tensor that is not finite, or a folder that cannot be written.
    """
    files, saved = prepared(model, name, folder, dtype, facts)
    owned = set(OWNED) - (set() if CARD in files else {CARD})
    if writes(tensors_of(model, name).values()):
        commit.write(folder, files, owned)
    return saved


def export_peft(model: nn.Module, name: str, folder: str | os.PathLike[str]) -> SaveReport:
    """Writes the two files of stock PEFT for the adapter `name` into `folder`, and nothing else.

    What `save` writes is read by PEFT as well; this is for who wants no record, and no card.

    Raises:
        AdapterError: PEFT has no words for the adapter, or as `save`.
    """
    adapter, tensors, notes = _ready(model, name, None)
    expressed = _in_pefts_words(model, adapter, list(tensors), base_name(model))
    if isinstance(expressed, str):
        raise AdapterError(f"{name!r} cannot be written for stock PEFT: {expressed}.")
    if adapter.method.kind == "keyvalue":
        require_alike(unwrapped(model), name, cast(Sequence[KeyValueSite], adapter.sites), tensors)
    two = {CONFIG: expressed.config, WEIGHTS: _weights(expressed.stored(tensors))}
    if writes(tensors_of(model, name).values()):
        commit.write(folder, two, set(two))
    return _report(folder, name, two, tensors, "written", (*notes, *expressed.notes))


def prepared(
    model: nn.Module,
    name: str,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> tuple[dict[str, bytes], SaveReport]:
    """The files of an adapter's folder, and what will be said of them; nothing is written."""
    adapter, tensors, notes = _ready(model, name, dtype)
    bundle = _bundle(model, adapter, tensors, facts or {})
    base_name = (bundle.base or {}).get("name")
    expressed = _in_pefts_words(model, adapter, list(tensors), base_name)
    if isinstance(expressed, PeftFiles) and expressed.orders:
        expressed = REORDERED  # what swaps read as it lies in the file is not put in order first
    files = _files(bundle, expressed)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    peft = "written" if isinstance(expressed, PeftFiles) else expressed
    if ours(existing_card(folder)):
        files[CARD] = card(bundle, parameters, base_name, peft)
    else:
        notes.append(f"{CARD} was written by someone else and stays as it is.")
    notes += expressed.notes if isinstance(expressed, PeftFiles) else ()
    return files, _report(folder, name, files, tensors, peft, notes)


def _ready(
    model: nn.Module, name: str, dtype: torch.dtype | str | None
) -> tuple[Adapter, dict[str, Tensor], list[str]]:
    """The adapter, its tensors as a file holds them, and what was done to them."""
    adapter, held = _find(model, name), tensors_of(model, name)
    require_gatherable(held)
    tensors, notes = _cast(held, dtype)
    try:
        require_finite(tensors, f"{name!r} was not saved")
    except DamagedAdapter as error:  # here the model holds the damage, not a file
        raise AdapterError(str(error)) from error
    return adapter, tensors, notes


def _report(
    folder: str | os.PathLike[str],
    name: str,
    files: Mapping[str, bytes],
    tensors: Mapping[str, Tensor],
    peft: str,
    notes: Sequence[str],
) -> SaveReport:
    sizes = {key: len(content) for key, content in files.items()}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return SaveReport(os.fspath(folder), name, sizes, len(tensors), parameters, peft, tuple(notes))


def _weights(held: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(dict(held), {"format": "pt"})  # what transformers and PEFT look for in the header


def _in_pefts_words(model: nn.Module, adapter: Adapter, names: list[str], base: str | None) -> PeftFiles | str:
    tokens = adapter.tokens
    rows = {tokens.key(table) for table in tokens.tables} if tokens is not None else set()
    others = [name for name in names if name not in rows]
    found = express(model, adapter.method, adapter.sites, adapter.head, others, base)
    return found if tokens is None or isinstance(found, str) else with_tokens(model, found, adapter.sites, tokens)


def _find(model: nn.Module, name: str) -> Adapter:
    attached = adapters_of(model)
    if name not in attached:
        have = f"Attached: {', '.join(attached)}." if attached else "None is attached."
        raise AdapterError(f"no adapter {name!r} on this model{nearest(name, attached)} {have}")
    return attached[name]


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | str | None) -> tuple[dict[str, Tensor], list[str]]:
    target = None
    if dtype is not None:
        word = str(dtype).removeprefix("torch.")
        target = DTYPES.get(SHORT.get(word, word))
        if target is None:
            raise AdapterError(f"dtype is {word!r}{nearest(word, DTYPES)} An adapter is stored as {', '.join(DTYPES)}.")
    notes = []
    stored = {}
    for key, tensor in tensors.items():
        here = whole(tensor.detach()).to("cpu", target or tensor.dtype).contiguous()
        # safetensors refuses tensors that are views of a larger storage
        stored[key] = here if here.untyped_storage().nbytes() == here.nbytes else here.clone()
    down = sorted({str(t.dtype) for t in tensors.values() if target is not None and t.dtype.itemsize > target.itemsize})
    if down:
        notes.append(f"rounded from {', '.join(down).replace('torch.', '')} to {str(target).removeprefix('torch.')}.")
    return stored, notes


def _bundle(model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Bundle:
    state = state_of(model)
    return Bundle(
        name=adapter.name,
        method=adapter.method,
        sites=adapter.sites,
        tensors=tensors,
        head=adapter.head,
        base={"name": base_name(model), **fingerprint(model, exclude=adapter.head)},
        facts=json_safe(adapter.facts),
        training=json_safe(facts),
        labels=dict(adapter.labels) if adapter.labels else None,
        versions=_versions(),
        map=state.map if state is not None else None,
        tokens=adapter.tokens,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def base_name(model: nn.Module) -> str | None:
    """The base's name where others can find it; None for a path, which would tell of the machine it was saved on."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    known = re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) is not None
    return name if known and not os.path.exists(name) else None


def _files(bundle: Bundle, expressed: PeftFiles | str) -> dict[str, bytes]:
    keys = expressed.keys if isinstance(expressed, PeftFiles) else {key: key for key in bundle.tensors}
    held = expressed.stored(bundle.tensors) if isinstance(expressed, PeftFiles) else dict(bundle.tensors)
    weights = _weights(held)
    if isinstance(expressed, PeftFiles):
        config = expressed.config
    else:
        config = marker(method_record(bundle.method), bundle.head, (bundle.base or {}).get("name"))
    return {WEIGHTS: weights, CONFIG: config, RECORD: encode(bundle, keys, config, weights)}


def existing_card(folder: str | os.PathLike[str]) -> bytes | None:
    if not os.path.isdir(folder):
        return None
    with commit.reading(folder) as view:
        return view.get(CARD)


@cache
def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def save_attached(model: nn.Module, folder: str, write: bool = True) -> None:
    """What `save_pretrained` of an adapted model does: the adapter `default`, or the only one, into `folder`.

    Further adapters go into subfolders of their names, as PEFT puts them.

    Args:
        write: False for a process that only takes part in gathering tensors that are sharded.
    """
    for name, place in folders(model, folder).items():
        if write or any(is_sharded(tensor) for tensor in tensors_of(model, name).values()):
            save(model, name, place)


def folders(model: nn.Module, folder: str) -> dict[str, str]:
    """Where `save_attached` puts each attached adapter."""
    names = list(adapters_of(model))
    first = "default" if "default" in names else names[0]
    for name in names:
        if name != first and not commit.plain(name):
            raise AdapterError(f"{name!r} cannot name a folder; save it with adapters.save into one that you choose.")
    return {name: folder if name == first else os.path.join(folder, name) for name in names}
