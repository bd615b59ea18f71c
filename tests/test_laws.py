"""Laws 1 to 11 for every method on every tiny architecture, in fp32, bf16 and on an nf4 base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import LAWS, Case

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 4, "alpha": 6.0}),
    "rslora": ("lora", {"rank": 3, "alpha": 2.0, "rslora": True}),
    "patterns": (
        "lora",
        {"bias": True, "rank_pattern": {"mlp.*": 2}, "alpha_pattern": {"attention.*": 7.0}, "rank": 4},
    ),
    "qlora": ("qlora", {"rank": 4, "alpha": 6.0}),
    "dora": ("dora", {"rank": 4, "alpha": 6.0}),
    "ia3": ("ia3", {}),
    "pfeiffer": ("bottleneck", {"reduction_factor": 6.0}),
    "houlsby": ("bottleneck", {"placement": "houlsby", "reduction_factor": 8.0, "activation": "gelu"}),
    "parallel": ("bottleneck", {"placement": "parallel", "reduction_factor": 5.0, "scale": 4.0}),
    "normed": ("bottleneck", {"placement": "houlsby", "reduction_factor": 6.0, "reads": "normed"}),
    "prefix": ("prefix", {"length": 3}),
    "loha": ("loha", {"rank": 3, "alpha": 200.0}),  # the plugin of tests/plugin, which only an entry point names
}
PRECISIONS = {"qlora": ("nf4",), "patterns": ("fp32", "nf4")}  # the layers of an nf4 base compute in bf16
NOISE = {"ia3": 1.0}  # scaling alone moves the outputs of bf16 little more than rounding does


def cases() -> list[Any]:
    found = []
    for name in tiny.NAMES:
        for label, (method, options) in OPTIONS.items():
            for precision in PRECISIONS.get(label, ("fp32", "bf16", "nf4")):
                dtype = torch.float32 if precision == "fp32" else torch.bfloat16
                build, batch = partial(tiny.build, name, dtype), tiny.inputs(name)
                case = Case(build, batch, method, options, dtype, precision == "nf4", NOISE.get(label, 0.08))
                found.append(pytest.param(case, id=f"{name}-{label}-{precision}"))
    return found


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", cases())
def test_law(case: Case, law: Callable[[Case, Path], None], tmp_path: Path) -> None:
    law(case, tmp_path / "adapter")
