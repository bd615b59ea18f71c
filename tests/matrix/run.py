"""All laws for all methods on one pair, in this process; each result is sent as soon as it is known."""

from __future__ import annotations

import copy
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import LAWS, Case, output
from torch import nn

import adapters
from tests.matrix.build import build
from tests.matrix.methods import METHODS, NOISE
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
    for method in methods:
        _method(method, model, batch, emit, laws)


def _method(
    label: str, model: nn.Module, batch: dict[str, Any], emit: Callable[[Row], None], laws: Collection[int]
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
    case = Case(lambda: copy.deepcopy(model), batch, name, options, dtype, nf4, NOISE.get(label, 0.08))
    try:
        case.attach(case.base())
        case = replace(case, sites=adapters.sites(model))  # traced once; the laws hold for a map as for a trace
    except adapters.AdapterError as error:
        emit((label, "", "refused", str(error), 0.0))
        return
    except Exception as error:
        emit((label, "", "fail", _reason(error), 0.0))
        return
    for law in LAWS:
        if not laws or _number(law) in laws:
            emit((label, str(_number(law)), *_outcome(law, case)))


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
