"""Adapter folders combined into a new one, without a model: exactly what their records allow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import safetensors.torch

from adapters._algebra.bases import bases_apart, without
from adapters._algebra.combining import checked, combined
from adapters._algebra.operands import Operand, stored
from adapters._algebra.peft_words import Words, in_pefts_words
from adapters._algebra.reports import CombineReport
from adapters._algebra.ways import Way
from adapters._errors import AdapterError, WrongBase
from adapters._interop.files import PeftFiles
from adapters._interop.peft_write import marker
from adapters._store import commit
from adapters._store.bundle import CARD, CONFIG, OWNED, RECORD, WEIGHTS, Bundle, method_record
from adapters._store.card import card, ours
from adapters._store.record import encode
from adapters._store.saving import existing_card


def combine_folders(
    output: str | os.PathLike[str], weights: Mapping[str, float], way: Way, name: str | None = None
) -> CombineReport:
    """Writes the combination of the adapters in the folders that `weights` names into the folder `output`.

    Raises:
        WrongBase: the records of two folders are of different bases.
        DamagedAdapter, AdapterError: as `adapters.read` and `adapters.combine`.
    """
    weights = checked(weights)
    operands = [
        replace(stored(folder), label=label) for folder, label in zip(weights, _labels(list(weights)), strict=True)
    ]
    first = operands[0]
    for other in operands[1:]:
        why = bases_apart(first.bundle, other.bundle)
        if why:
            raise WrongBase(f"{first.label} and {other.label} were made for different bases: {why}")
    label = name if name is not None else os.path.basename(os.path.abspath(output))
    made, report = combined(label, list(zip(weights.values(), operands, strict=True)), way)
    bundle = _recorded(made, operands)
    write(output, bundle, in_pefts_words(bundle, [Words.of(operand.bundle) for operand in operands]))
    return report


def _labels(folders: list[str]) -> list[str]:
    """The folders' names, without what would tell of the machine; with their parents' where two are alike."""
    for depth in (1, 2, 3):
        found = ["/".join(os.path.abspath(folder).split(os.sep)[-depth:]) for folder in folders]
        if len(set(found)) == len(found):
            return found
    raise AdapterError(f"two of the folders {', '.join(folders)} are one, or cannot be told apart by their names.")


def write(folder: str | os.PathLike[str], bundle: Bundle, expressed: PeftFiles | str) -> None:
    """The four files of an adapter, in one step; a card that someone else wrote stays."""
    base_name = (bundle.base or {}).get("name")
    known = isinstance(expressed, PeftFiles)
    keys = expressed.keys if isinstance(expressed, PeftFiles) else {key: key for key in bundle.tensors}
    weights = safetensors.torch.save({keys[key]: tensor for key, tensor in bundle.tensors.items()}, {"format": "pt"})
    config = (
        expressed.config
        if isinstance(expressed, PeftFiles)
        else marker(method_record(bundle.method), bundle.head, base_name)
    )
    files = {WEIGHTS: weights, CONFIG: config, RECORD: encode(bundle, keys, config, weights)}
    owned = set(OWNED)
    if ours(existing_card(folder)):
        files[CARD] = card(bundle, bundle.parameters, base_name, "written" if known else str(expressed))
    else:
        owned.remove(CARD)
    commit.write(folder, files, owned)


def _recorded(made: Bundle, operands: list[Operand]) -> Bundle:
    """With what the folders know of the base, its sites, and the libraries."""
    bundles = [operand.bundle for operand in operands]
    known = next((bundle for bundle in bundles if bundle.base is not None), None)
    if known is None or known.base is None:
        raise AdapterError("none of these folders carries a record of its base.")
    return replace(
        made,
        base=without(known.base, made.head),
        versions=known.versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        map=next((bundle.map for bundle in bundles if bundle.map is not None), None),
    )
