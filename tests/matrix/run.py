"""All laws for all methods on one pair, in this process; each result is sent as soon as it is known."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import LAWS, Case, output, relative
from torch import nn

import adapters
from tests.matrix.build import build
from tests.matrix.methods import METHODS, NOISE, SHOWN
from tests.matrix.pairs import Pair

Row = tuple[str, str, str, str, float]  # method, law, result, reason, seconds


def run(pair: Pair, emit: Callable[[Row], None], methods: Collection[str], laws: Collection[int] = ()) -> None:
    """Rows for one pair: the building of its model first, then each method's laws, or why it is refused."""
    started = time.monotonic()
    try:
        model, batch = build(pair)
        before = output(model, batch)
        if not torch.isfinite(before).all() or not torch.equal(before, output(model, batch)):
            raise RuntimeError("the base's own output is not finite, or not the same twice")
    except Exception as error:  # whatever a stranger's model may raise is the row's content
        emit(("build", "", "fail", _reason(error), time.monotonic() - started))
        return
    emit(("build", "", "pass", f"{sum(p.numel() for p in model.parameters())} parameters", time.monotonic() - started))
    try:
        example = None if _probed(model) else batch
        found = _mapped(model, example)
    except Exception as error:
        result = "refused" if isinstance(error, adapters.AdapterError) else "fail"
        emit(("map", "", result, _reason(error), time.monotonic() - started))
        return
    how = f"{len(list(found))} sites" + (", found with example=" if example is not None else "")
    emit(("map", "", "pass", how, time.monotonic() - started))
    for method in methods:
        _method(method, model, batch, found, example, emit, laws)


def _probed(model: nn.Module) -> bool:
    """Whether the probe can make an input for the model by itself."""
    try:
        adapters.sites(model)
    except adapters.AdapterError:
        return False
    return True


def _mapped(model: nn.Module, example: dict[str, Any] | None) -> adapters.SiteMap:
    """The model's map, in which every parameter of two or more dimensions stands once, and which survives JSON."""
    found = adapters.sites(model, example)
    assert adapters.SiteMap.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    named = [path for site in found.weights for path in (site.path, *site.aliases)]
    known = {*named, *(left.path for left in (*found.unreached, *found.others))}
    names: dict[int, set[str]] = defaultdict(set)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2:
            names[id(parameter)].add(path)
    silent = [sorted(paths)[0] for paths in names.values() if not paths & known]
    assert not silent, f"the map does not mention {silent[:3]}"
    left = [site.path for site in found.weights if ".experts." in site.path and not site.default]
    left += [each.path for each in (*found.unreached, *found.others) if re.search(r"\.experts\.(?!.*bias)", each.path)]
    assert not left, f"experts that are not adapted: {left[:3]}"
    return found


def _method(
    label: str,
    model: nn.Module,
    batch: dict[str, Any],
    found: adapters.SiteMap,
    example: dict[str, Any] | None,
    emit: Callable[[Row], None],
    laws: Collection[int],
) -> None:
    name, options = METHODS[label]
    nf4 = label == "qlora"
    dtype = torch.bfloat16 if nf4 else torch.float32
    if nf4:
        model = copy.deepcopy(model).to(dtype)
        batch = {key: value.to(dtype) if _floating(value) else value for key, value in batch.items()}
        try:
            output(model, batch)
        except Exception as error:
            emit((label, "", "not run", f"the base does not run in bf16: {_reason(error)}", 0.0))
            return
    seen = batch if example is not None else None
    # traced once: the laws hold for a map as for a trace
    case = Case(lambda: copy.deepcopy(model), batch, name, options, dtype, nf4, NOISE.get(label, 0.08), found, seen)
    try:
        case = _showing(case, SHOWN.get(label, 5e-3))
    except adapters.AdapterError as error:
        emit((label, "", "refused", str(error), 0.0))
        return
    except Exception as error:
        emit((label, "", "fail", _reason(error), 0.0))
        return
    for law in LAWS:
        if not laws or _number(law) in laws:
            emit((label, str(_number(law)), *_outcome(law, case)))


def _showing(case: Case, wanted: float) -> Case:
    """The case with the noise doubled, up to five times, until the adapter shows in what a random model returns.

    Halved, up to twice, where it leaves nothing of the base's output: a deep random model may be chaotic there, and
    tells one rounding from another as loudly.
    """
    before = output(case.base(), case.inputs)

    def shown(noise: float) -> float:
        return relative(output(replace(case, noise=noise).shaken(), case.inputs), before)

    noise, effect = case.noise, shown(case.noise)
    while effect <= wanted and noise < 32 * case.noise:
        noise, effect = 2 * noise, shown(2 * noise)
    while effect > 1 and noise > case.noise / 4:
        noise, effect = noise / 2, shown(noise / 2)
    return replace(case, noise=noise)


def _number(law: Callable[..., None]) -> int:
    return int(law.__name__.split("_")[1])


def _outcome(law: Callable[[Case, Path], None], case: Case) -> tuple[str, str, float]:
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            law(case, Path(folder) / "adapter")
        result, reason = "pass", ""
    except pytest.skip.Exception as skipped:
        result, reason = "no object", str(skipped)
    except Exception as error:
        result, reason = "fail", _reason(error)
    return result, reason, time.monotonic() - started


def _reason(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch/nn/modules" not in f.filename]
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__} at {where}: {text or (frames[-1].line if frames else '')}"[:400]


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
