"""Folding LoRA r16 into every linear weight: W + s B A, and the bare model handed back.

The row that is held against PEFT is that arithmetic with what keeps a refusal harmless (the old weights stay until the
end, infinities are looked for). Measuring each weight's rounding, and the forwards that make the certificate, which
PEFT has no counterpart of, are rows of their own. The merged weights of both sides must agree.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import adapters
from adapters._merge import exact
from adapters._merge.allowed import mergeable
from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import LORA, NAME, Setting, close, saved, shake

MERGE = sys.modules[adapters.merge.__module__]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}  # of the change, which bf16 weights round away in part


def _arithmetic(model: nn.Module) -> nn.Module:
    merging = mergeable(model, NAME)
    with mock.patch.object(exact, "relative", return_value=0.0):
        merged = exact.merged_parameters(model, merging)
    MERGE._apply(model, merging, merged.new, {}, [])
    adapters.detach(model, NAME)
    return model


def _merge(setting: Setting, dtype: torch.dtype) -> Pair:
    import peft

    ours, base = setting.base(dtype), setting.base(dtype)
    folder = saved(setting, ours, f"merge-{str(dtype).removeprefix('torch.')}", "lora", **LORA)
    sites = [site.path for site in adapters.sites(ours).weights if site.default]
    original = {path: parameter.detach().clone() for path, parameter in ours.named_parameters()}
    held: dict[str, Any] = {}

    def attach_theirs() -> None:
        held["theirs"] = peft.PeftModel.from_pretrained(base, str(folder))

    def take(model: nn.Module) -> Tensor:
        """A part of what every merged weight changed by; the base's weights go back in for the next round."""
        parameters = dict(model.named_parameters())
        assert parameters.keys() == original.keys(), "merging did not give the bare model back"
        changed = []
        with torch.no_grad():
            for site in sites:
                parameter = parameters[site]
                changed.append((parameter[:8] - original[site][:8]).flatten())
                assert changed[-1].any(), f"a side left {site} as it was"
                parameter.copy_(original[site])
        return torch.cat(changed)

    return Pair(
        Side(lambda: _arithmetic(ours), lambda: adapters.load(ours, folder, name=NAME), take),
        Side(lambda: held["theirs"].merge_and_unload(), attach_theirs, take),
        close(TOLERANCE[dtype]),
    )


def _rounding(setting: Setting) -> Pair:
    model = setting.base(torch.float32)
    adapters.load(model, saved(setting, model, "rounding", "lora", **LORA), name=NAME)
    merging = mergeable(model, NAME)
    return Pair(Side(lambda: exact.merged_parameters(model, merging).predicted, after=lambda found: len(found)))


def _certified(setting: Setting) -> Pair:
    """The public function: three forwards on the probe's batch, the sites' outputs before and after, the arithmetic."""
    held: dict[str, nn.Module] = {}

    def attach() -> None:  # on a base of its own, because merging changes it
        held["model"] = setting.base(torch.float32)
        adapters.attach(held["model"], "lora", name=NAME, **LORA)
        shake(held["model"])

    return Pair(Side(lambda: adapters.merge(held["model"], NAME), attach, lambda certificate: certificate.error))


ROWS = [
    Row("merge arithmetic, fp32", partial(_merge, dtype=torch.float32)),
    Row("merge arithmetic, bf16", partial(_merge, dtype=torch.bfloat16)),
    Row("merge arithmetic with each weight's rounding, fp32", _rounding, peer="", gated=False, most_pairs=3),
    Row("merge as called: with its certificate, fp32", _certified, peer="", gated=False, most_pairs=3),
]
