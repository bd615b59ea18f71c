"""Adapters from and to a folder: LoRA r16 on every linear layer, fp32.

PEFT checks nothing that it reads and syncs nothing that it writes. The rows that do the same work are the raw ones:
read the files and place the tensors, serialise and write. Digests, the base's fingerprint and fsync are rows of their
own, and "as called" is the public function with everything in it. The file cache is warm.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
from adapters._attach import install, replace, tensors_of
from adapters._sites import site_of
from adapters._store import bundle, commit, fingerprints, record, saving, weights
from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import LORA, NAME, Setting, close, equal, saved, twins


def raw(folder: Path) -> tuple[Any, tuple[Any, ...], dict[str, Tensor]]:
    """Method, sites and tensors of one of our folders, read without any check."""
    with commit.reading(folder) as view:
        about, stored = json.loads(view[bundle.RECORD]), weights.parse(view[bundle.WEIGHTS])
    tensors = {key: stored[entry["file_key"]] for key, entry in about["tensors"].items()}
    return bundle.method_of(about["method"]), tuple(map(site_of, about["sites"])), tensors


def total(model: nn.Module) -> float:
    """A number that depends on every adapter tensor of either side."""
    if NAME in adapters.adapters_of(model):
        return sum(float(tensor.detach().double().pow(2).sum()) for tensor in tensors_of(model, NAME).values())
    return sum(float(p.detach().double().pow(2).sum()) for name, p in model.named_parameters() if "lora_" in name)


def _load(setting: Setting, *, checked: bool) -> Pair:
    import peft

    ours, base = setting.base(torch.float32), setting.base(torch.float32)
    folder = saved(setting, ours, "load", "lora", **LORA)

    def run_ours() -> nn.Module:
        if checked:
            adapters.load(ours, folder, name=NAME)
        else:
            install(ours, NAME, *raw(folder))
        return ours

    def run_theirs() -> Any:
        # without low_cpu_mem_usage PEFT also initialises the tensors that it then overwrites
        return peft.PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=True)

    def after_ours(model: nn.Module) -> float:
        found = total(model)
        adapters.detach(model)
        return found

    def after_theirs(model: Any) -> float:
        found = total(model)
        model.unload()
        return found

    return Pair(Side(run_ours, after=after_ours), Side(run_theirs, after=after_theirs), close(1e-12))


def _digests(setting: Setting) -> Pair:
    folder = saved(setting, setting.base(torch.float32), "digests", "lora", **LORA)

    def read() -> Any:
        with commit.reading(folder) as view:
            return record.decode(view)

    return Pair(Side(read, after=lambda found: len(found.tensors)))


def _fingerprint(setting: Setting) -> Pair:
    model = setting.base(torch.float32)
    recorded = fingerprints.fingerprint(model)
    return Pair(Side(lambda: fingerprints.check(recorded, model)))


@contextlib.contextmanager
def unverified() -> Iterator[None]:
    """Saving without fsync, digests, fingerprint and the look for NaN; the record is then one that would be refused."""

    def nothing(*args: Any, **kwargs: Any) -> Any:  # a Mock would take longer than what it stands for
        return ""

    with (
        mock.patch.object(os, "fsync", nothing),
        mock.patch.object(record, "sha", nothing),
        mock.patch.object(saving, "require_finite", nothing),
        mock.patch.object(saving, "fingerprint", lambda *args, **kwargs: {}),  # noqa: PT008 - as above
    ):
        yield


def _save(setting: Setting, *, checked: bool) -> Pair:
    ours, theirs = twins(setting, torch.float32, train=False, **LORA)
    here, there = setting.folder(f"save-ours-{checked}"), setting.folder(f"save-theirs-{checked}")

    def run_ours() -> Path:
        with contextlib.nullcontext() if checked else unverified():
            adapters.save(ours, NAME, here)
        return here

    def run_theirs() -> Path:
        theirs.save_pretrained(str(there))
        return there

    def content(folder: Path) -> dict[str, float]:
        stored = load_file(folder / bundle.WEIGHTS)
        return {key: float(tensor.double().pow(2).sum()) for key, tensor in sorted(stored.items())}

    return Pair(Side(run_ours, after=content), Side(run_theirs, after=content), equal)


def _fsync(setting: Setting) -> Pair:
    """The staged files and folders of one save, synced as `save` does: waiting, not computing."""
    model, target = setting.base(torch.float32), setting.folder("fsync")
    folder = saved(setting, model, "fsync-source", "lora", **LORA)
    files = {name: (folder / name).read_bytes() for name in bundle.OWNED if (folder / name).exists()}
    return Pair(Side(lambda: commit.write(target, files, bundle.OWNED)))


def _swap(setting: Setting, *, checked: bool) -> Pair:
    from peft.utils.hotswap import hotswap_adapter

    ours, theirs = twins(setting, torch.float32, train=False, **LORA)
    other = saved(setting, setting.base(torch.float32), "swap", "lora", seed=5, **LORA)
    expected = sum(float(tensor.double().pow(2).sum()) for tensor in load_file(other / bundle.WEIGHTS).values())

    def run_ours() -> nn.Module:
        if checked:
            adapters.swap(ours, NAME, other)
        else:
            replace(ours, NAME, *raw(other))
        return ours

    def run_theirs() -> nn.Module:
        hotswap_adapter(theirs, str(other), NAME, torch_device="cpu")
        return theirs

    def agree(a: float, b: float) -> None:
        close(1e-12)(a, b)
        close(1e-12)(a, expected)

    return Pair(Side(run_ours, after=total), Side(run_theirs, after=total), agree)


def _row(name: str, build: Any, checked: bool) -> Row:
    label = f"{name}, as called: with digests and fingerprint" if checked else f"{name}, raw"
    return Row(
        label, lambda setting: build(setting, checked=checked), gated=not checked, most_pairs=3 if checked else 1000
    )


ROWS = [
    _row("load", _load, False),
    _row("load", _load, True),
    _row("hot swap", _swap, False),
    _row("hot swap", _swap, True),
    _row("save", _save, False),
    _row("save", _save, True),
    Row("read and verify every digest", _digests, peer="", gated=False, most_pairs=3),
    Row("compare the base's fingerprint", _fingerprint, peer="", gated=False, most_pairs=3),
    Row("write and fsync a folder", _fsync, peer="", gated=False, units=("wall ms",)),
]
