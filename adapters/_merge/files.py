"""Merges an adapter into a base that lies in files, shard by shard, in the memory that one shard needs.

The base's weights are mapped from its files, as transformers does on CPUs where their dtype is kept: what is read of
them is the system's to drop again. The merged model appears under its name when all of it is on the disk, was loaded
again, and gives the outputs of base and adapter; until then it lies in a folder beside, from which a merge that was
broken off goes on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters._attach import base_parameters, put_labels, tensors_of
from adapters._attach.swap import base_class
from adapters._coded import formats_in
from adapters._errors import AdapterError
from adapters._merge.allowed import Merging, mergeable
from adapters._merge.certificate import Certificate, of_little_effect, usual_limit
from adapters._merge.exact import Merged, dense_dtype, merge_rows, merged_bias, merged_weight
from adapters._merge.measure import Adapted, adapted, beside
from adapters._plan.sizes import bytes_in
from adapters._selection import Part
from adapters._whole import require_new, settle, write_whole

PROGRESS, INDEX = "merging.json", "model.safetensors.index.json"
CERTIFICATE = "merge_certificate.json"


@dataclass(frozen=True)
class _Shard:
    file: str
    names: tuple[str, ...]


def merge_files(
    model: nn.Module,
    name: Part,
    output: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    shard: str | int = "256MB",
    example: Mapping[str, Any] | None = None,
    prompts: Sequence[str] = (),
    tolerance: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Writes `model` with an adapter, or several, merged as a plain model of several files; the model stays as it is.

    A merge that is broken off goes on where it was when it is asked for again.

    Args:
        model: a dense base as `load_base` loads it, with the adapter attached.
        name: as `merge` takes it.
        output: folder of the merged model; it must not exist, or be empty.
        tokenizer: is saved along, and needed for prompts.
        shard: bytes of a file at most; a larger tensor has one of its own. About twice as much memory is needed, and
            four bytes, three times, for each element of the largest merged weight.
        example: keyword arguments of one forward on which the merged is compared with the adapted model.
        prompts, tolerance: as `merge` takes them.
        tell: is called with a sentence for each step.

    Raises:
        AdapterError: the adapter cannot be merged, the merged model does not load again, or its outputs differ by more
            than the tolerance; nothing is left behind then.
    """
    merging, target = mergeable(model, name), Path(output)
    if formats := formats_in(model):
        raise AdapterError(
            f"this base is held in {' and '.join(formats)}, and a merge by files reads dense weights: adapters.merge "
            "dequantises it in memory, or load the base in 16 bits."
        )
    require_new(target)
    before = adapted(model, merging, example, prompts, tokenizer)
    held = {path: p.detach() for path, p in base_parameters(model).items()}
    held |= {path: b for path, b in model.named_buffers() if _persists(model, path)}
    shards = _planned(held, bytes_in(shard))
    work = target.parent / f".{target.name}.merging"
    try:
        predicted = _written(model, merging, held, shards, work, tell)
        tell("comparing the merged model with the adapted one")
        _complete(model, merging, work, shards, tokenizer)
        certificate = _compared(model, merging, before, work, predicted, tolerance, tokenizer)
    except AdapterError:
        if work.exists():
            shutil.rmtree(work)
        raise
    (work / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=2, default=str) + "\n")
    (work / PROGRESS).unlink()
    if target.is_dir():
        target.rmdir()
    os.replace(work, target)
    return certificate


def _persists(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    return name not in module._non_persistent_buffers_set and not getattr(module, "is_adapter_container", False)


def _planned(held: Mapping[str, Tensor], most: int) -> list[_Shard]:
    """The names of each file, in the model's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in held.items():
        if groups[-1] and size + tensor.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    count = len(groups)
    return [_Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def _written(
    model: nn.Module,
    merging: Merging,
    held: Mapping[str, Tensor],
    shards: list[_Shard],
    work: Path,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Writes the shards that are not there yet; the rounding error of each merged weight."""
    plan = _identity(model, merging, shards)
    done: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError):
        known = json.loads((work / PROGRESS).read_text())
        done = known["done"] if known["plan"] == plan else {}
    if not done and work.exists():
        shutil.rmtree(work)  # of another merge, or of none
    work.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards, 1):
        tell(f"file {number} of {len(shards)}")
        base = _digest(held, shard)
        if done.get(shard.file, {}).get("base") == base and (work / shard.file).is_file():
            continue
        done[shard.file] = {"base": base, "rounding": _write(model, merging, held, shard, work)}
        write_whole(work / PROGRESS, json.dumps({"plan": plan, "done": done}).encode())
    return {path: error for each in done.values() for path, error in each["rounding"].items()}


def _digest(held: Mapping[str, Tensor], shard: _Shard) -> str:
    """Of every value of the base in a file, which a fingerprint only samples."""
    found = hashlib.sha256()
    for name in shard.names:
        found.update(name.encode())
        found.update(held[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _write(
    model: nn.Module, merging: Merging, held: Mapping[str, Tensor], shard: _Shard, work: Path
) -> dict[str, float]:
    """Writes one file; what it holds is let go before the next is made."""
    new, predicted = _merged(model, merging, held, shard)
    save_file({name: tensor.contiguous() for name, tensor in new.items()}, work / ".next", {"format": "pt"})
    settle(work / ".next", work / shard.file)
    return predicted


def _identity(model: nn.Module, merging: Merging, shards: list[_Shard]) -> str:
    """What base, adapters and plan are, so that no merge goes on with another's files."""
    from adapters._store.fingerprints import fingerprint

    digest = hashlib.sha256(json.dumps(fingerprint(model), sort_keys=True, default=str).encode())
    digest.update(repr((merging.selection, shards)).encode())
    for name, adapter in sorted(merging.adapters.items()):
        digest.update(repr((name, adapter.method, adapter.tokens)).encode())
        for key, tensor in sorted(tensors_of(model, name).items()):
            digest.update(key.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _merged(
    model: nn.Module, merging: Merging, held: Mapping[str, Tensor], shard: _Shard
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of one file, those that the adapters change merged, and their rounding errors."""
    wanted, found = set(shard.names), Merged()
    owners = {name.rpartition(".")[0] for name in shard.names}
    for site in merging.sites:
        path = site.path
        if path in wanted:
            found.new[path], found.predicted[path] = merged_weight(model, merging, site, held[path].dtype)
        biases = merged_bias(model, merging, site) if site.owner in owners else {}
        found.new.update({bias: value for bias, value in biases.items() if bias in wanted})
    for table in merging.tokens.tables if merging.tokens is not None else ():
        if table in wanted:
            merge_rows(model, merging, table, found)
    for path, tensor in _heads(model, merging).items():
        if path in wanted:
            found.new[path] = tensor.to(held[path].dtype)
    return {name: found.new.get(name, held[name]) for name in shard.names}, found.predicted


def _heads(model: nn.Module, merging: Merging) -> dict[str, Tensor]:
    """The parameters of trained heads by the base's names for them."""
    found = {}
    for key, tensor in tensors_of(model, merging.bearer.name).items():
        path, _, name = key.rpartition(":head.")
        if path in merging.bearer.head:
            found[f"{path}.{name}"] = tensor.detach()
    return found


def _complete(model: Any, merging: Merging, work: Path, shards: list[_Shard], tokenizer: Any) -> None:
    """What a folder of weights needs to be a model."""
    where = {name: shard.file for shard in shards for name in shard.names}
    total = sum((work / shard.file).stat().st_size for shard in shards)
    (work / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    config = copy.deepcopy(model.config)
    config.architectures = [base_class(model).__name__]
    config.dtype = dense_dtype(model)  # in which the files are read again
    if merging.bearer.labels:
        put_labels(config, merging.bearer.labels)
    config.save_pretrained(work)
    for part in (getattr(model, "generation_config", None), tokenizer):
        if part is not None:
            part.save_pretrained(work)


def _compared(
    model: Any,
    merging: Merging,
    before: Adapted,
    work: Path,
    predicted: Mapping[str, float],
    tolerance: float | None,
    tokenizer: Any,
) -> Certificate:
    """Loads the folder as anybody would, and compares.

    Raises:
        AdapterError: it lacks something, or its outputs differ by more than the tolerance.
    """
    cls = base_class(model)
    merged, report = cls.from_pretrained(work, dtype="auto", output_loading_info=True)
    lacking = sorted({*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])})
    if lacking:
        raise AdapterError(
            f"the merged files of {cls.__name__} do not load again ({lacking[0]}): its checkpoints have other names "
            "than its parameters. Merge it in memory, with adapters.merge."
        )
    merged.eval()
    found = beside(merged, before, tokenizer)
    dtype = next(p.dtype for path, p in base_parameters(model).items() if path in predicted)
    limit = tolerance if tolerance is not None else usual_limit(dtype)
    found.require_within(merging, limit, limit)
    count = len(list(work.glob("model-*.safetensors")))
    how = f"into {count} files in {str(dtype).removeprefix('torch.')}"
    notes = of_little_effect(found.error, before.effect, dtype)
    return found.certificate(merging, before, predicted, how, limit, notes)
