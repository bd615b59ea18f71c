"""The methods that the matrix runs, by the name of their row."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 4, "alpha": 6.0}),
    "houlsby": ("bottleneck", {"placement": "houlsby", "reduction_factor": 8.0, "activation": "gelu"}),
    "pfeiffer": ("bottleneck", {"placement": "pfeiffer", "reduction_factor": 8.0, "activation": "gelu"}),
    "parallel": ("bottleneck", {"placement": "parallel", "reduction_factor": 8.0, "activation": "gelu", "scale": 4.0}),
    "prefix": ("prefix", {"length": 3}),
    "qlora": ("qlora", {"rank": 4, "alpha": 6.0}),
    "dora": ("dora", {"rank": 4, "alpha": 6.0}),
    "ia3": ("ia3", {}),
}
# what a tensor is shaken by at first, where 0.08 would hardly show: a scaling by 1.08 is undone by the next norm
NOISE = {"ia3": 1.0}
# how far the shaken adapter must move the output; a change of a base in 4 bits is merged within 0.05
SHOWN = {"qlora": 0.1}
